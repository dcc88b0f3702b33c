"""The Triton kernels through Triton's interpreter: the tests of gpu_contract_cases.py, and those of the ways these kernels
cut lists and sum in linear time.

test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1: the switch is read when triton is imported.
"""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch

import pile_fast
from pile_fast.backends import triton as backend
from pile_fast.backends import triton_long

warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, on the NaN that stands for "missing"


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu = _load("gpu_contract_cases")
battery, contract = gpu.battery, gpu.contract
globals().update({k: v for k, v in vars(gpu).items() if k.startswith("test_") or k in gpu.FIXTURES})
del test_packed_ensemble  # noqa: F821  (test_packed_lists_longer_than_a_block asks more)

# Few iterations: an operation in the interpreter takes 50 microseconds.
_ensemble = battery.ensemble
battery.ensemble = lambda t, y, how, granularity, **kw: _ensemble(
    t, y, how, granularity, **({} if "return_trace" in kw else {"iterations": 3}) | kw
)


def pile(z, t, y, **kw):
    return pile_fast.pile_loss(z, t, y, alpha=0.5, granularity="query", pair_weight="gain_gap", iterations=2, **kw)


@pytest.fixture(params=[battery.distill, battery.distill_mse, battery.rank_weighted, pile], ids=lambda f: f.__name__)
def loss(request):
    return request.param


pytestmark = pytest.mark.usefixtures("poisoned")
HOW = dict(backend="triton", pairwise="direct")


@pytest.fixture
def how():
    return HOW


@pytest.fixture(autouse=True)
def blocks(request, monkeypatch):
    """The interpreter takes as long for a wide tile as for a narrow one, so the battery runs on wide ones."""
    if "launches" not in request.fixturenames:
        config = backend._config
        monkeypatch.setattr(backend, "_config", lambda slots, teachers: config(slots, teachers) | {"BC": 32})


@pytest.fixture(params=["one launch", "a launch per phase"])
def launches(request, monkeypatch):
    """Tiles as on a GPU. The rule picks several launches for few lists longer than a block; make the block short."""
    config = backend._config
    if request.param == "a launch per phase":
        monkeypatch.setattr(backend, "_config", lambda slots, teachers: config(slots, teachers) | {"BR": 16})
        monkeypatch.setattr(triton_long, "DIRECT_CHUNK", 32)


@pytest.fixture
def short_blocks(monkeypatch):
    """Blocks as many as long lists have, in short ones: groups of 32 are large, smaller ones share up to 63 documents."""
    monkeypatch.setattr(triton_long, "WINDOW", 32)


@pytest.fixture
def long_list(short_blocks):
    return 66


ENSEMBLES = [
    # n, M, queries, options; lengths around one and two column tiles, one block, several
    (1, 1, 1, {}),
    (2, 3, 3, dict(pair_weight="label_gap", margin=0.3)),
    (7, 3, 1, dict(normalize="center", temperature=0.5)),
    (17, 1, 3, dict(normalize="none", margin=-0.2)),
    (33, 3, 2, dict(pair_weight="gain_gap", temperature=2.0)),
    (33, 5, 2, dict(normalize="none", margin=0.3, pair_weight="label_gap")),
    (40, 3, 1, dict(iterations=6)),
]


@pytest.fixture(params=ENSEMBLES, ids=str)
def ensemble_case(request, launches):
    return request.param


@pytest.fixture(params=[(n, 40) for n in (1, 2, 7, 33)], ids=str)
def loss_case(request, launches):
    return request.param


def test_raw_logits_far_from_zero_beside_a_document_that_nobody_scored(launches):
    _, t, y, _ = contract.make(40)
    t += 500
    t[:, 3] = torch.nan
    options = dict(normalize="none", iterations=2)
    want = pile_fast.pile_ensemble(t.double(), y, backend="torch", **options).logits
    same = pile_fast.pile_ensemble(t, y, backend="torch", **options).logits
    contract.close(pile_fast.pile_ensemble(t, y, **options, **HOW).logits, same, want, 2e-6 * contract.scale_of(t))


def test_packed_lists_longer_than_a_block(launches):
    z, t, y, _ = contract.make(90, 1, 3, missing=0.2, unlabelled=0.1)
    cu_seqlens = torch.tensor([0, 0, 50, 51, 51, 85])
    options = dict(cu_seqlens=cu_seqlens, return_weights=True, return_trace=True, iterations=2)
    for granularity in ("document", "query"):
        got = pile_fast.pile_ensemble(t[0], y[0], granularity=granularity, **options, **HOW)
        want = pile_fast.pile_ensemble(t[0].double(), y[0], granularity=granularity, backend="torch", **options)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=4e-6, equal_nan=True)


# -- sums in linear time

LINEAR = HOW | dict(pairwise="chebyshev")
LONG_LISTS = [
    # (n, queries, teachers), data, options: grades, some of them large groups and some sharing a block; labels all different;
    # a range of some 40 cells; one of more cells than a grid has; blocks beside a document without label or teacher.
    ((150, 2, 3), dict(missing=0.4, unlabelled=0.3, masked=0.2), dict(pair_weight="label_gap", iterations=2)),
    ((150, 1, 3), dict(labels="continuous", unlabelled=0.1), dict(margin=0.3, iterations=2)),
    ((100, 1, 2), dict(labels="continuous"), dict(temperature=0.1, iterations=1, pair_weight="gain_gap", margin=-0.2)),
    ((90, 1, 2), dict(), dict(temperature=0.001, iterations=1)),
]


@pytest.mark.parametrize("shape, data, options", LONG_LISTS, ids=str)
def test_ensemble_in_linear_time(shape, data, options, granularity, short_blocks):
    n, queries, teachers = shape
    _, t, y, mask = contract.make(n, queries, teachers, **data)
    full = dict(mask=mask, granularity=granularity, return_weights=True, return_trace=True, **{"iterations": 3} | options)
    want = pile_fast.pile_ensemble(t.double(), y, backend="torch", **full)
    same = pile_fast.pile_ensemble(t, y, backend="torch", **full)
    got = pile_fast.pile_ensemble(t, y, **full, **LINEAR)
    for a, b, c in zip(got, same, want, strict=True):
        contract.close(a, b, c, 2e-6 * contract.scale_of(t))


@pytest.mark.parametrize(
    "n, spread, data, options",
    [
        (150, 5.0, dict(missing=0.4, unlabelled=0.3, masked=0.2), dict(alpha=0.3, pair_weight="gain_gap")),
        (150, 1.0, dict(labels="continuous"), dict(alpha=0.5, reduction="none")),
        (100, 5.0, dict(labels="continuous"), dict(alpha=0.5, distillation="logistic:temperature=0.5", reduction="sum")),
        (80, 100.0, dict(), dict(alpha=0.5, distillation="mse")),
        (80, 300.0, dict(), dict(alpha=0.5)),  # no grid
    ],
    ids=str,
)
def test_losses_in_linear_time(n, spread, data, options, short_blocks):
    z, t, y, mask = contract.make(n, 1 + ("masked" in data), 2, spread=spread, **data)
    options = dict(iterations=1, **options)
    want, want_gradient = contract.loss_and_gradient(z.double(), t.double(), y, mask, backend="torch", **options)
    same, same_gradient = contract.loss_and_gradient(z, t, y, mask, backend="torch", **options)
    got, gradient = contract.loss_and_gradient(z, t, y, mask, **LINEAR, **options)
    contract.close(got, same, want, 2e-6 * max(1.0, want.abs().max().item()))
    contract.close(gradient, same_gradient, want_gradient, 1e-5 * want_gradient.abs().max().item())


def test_well_ordered_lists_keep_their_digits(short_blocks):
    # Two grades, all pairs right by 12 and more: losses and gradients of e^-12 and less.
    y = torch.arange(120)[None] % 2
    z = (y * 14.0 + torch.rand(1, 120)).requires_grad_()
    loss = pile_fast.ranking_loss(z, y, **LINEAR)
    (gradient,) = torch.autograd.grad(loss, z)
    wide = z.detach().double().requires_grad_()
    want = pile_fast.ranking_loss(wide, y, backend="torch")
    (want_gradient,) = torch.autograd.grad(want, wide)
    assert abs(loss - want) <= 1e-5 * want
    assert (gradient - want_gradient).abs().max() <= 1e-5 * want_gradient.abs().max()


def test_packed_lists_long_and_short_in_linear_time(monkeypatch):
    # More than 128 chunks, so their sums have two levels; a long list among short and empty ones; documents of no query.
    monkeypatch.setattr(triton_long, "WINDOW", 4)
    z, t, y, _ = contract.make(150, 1, 2, missing=0.2, unlabelled=0.1)
    z, t, y, cu_seqlens = z[0], t[0], y[0], torch.tensor([0, 3, 3, 131, 132, 147], dtype=torch.int32)
    options = dict(cu_seqlens=cu_seqlens, iterations=1, alpha=0.5, reduction="none")
    want, want_gradient = contract.loss_and_gradient(z.double(), t.double(), y, None, backend="torch", **options)
    got, gradient = contract.loss_and_gradient(z, t, y, None, **LINEAR, **options)
    contract.close(got, got, want, 2e-6)
    contract.close(gradient, gradient, want_gradient, 1e-5 * want_gradient.abs().max().item())


def test_a_broken_student_logit_in_a_long_list(short_blocks):
    z, t, y, _ = contract.make(70, 2, 1)
    options = dict(iterations=0, alpha=0.5, reduction="none", **LINEAR)
    want, want_gradient = contract.loss_and_gradient(z, t, y, None, **options)
    z[1, 7] = torch.inf
    got, gradient = contract.loss_and_gradient(z, t, y, None, **options)
    assert got[1].isnan() and gradient[1].isnan().all()
    assert torch.equal(got[0], want[0]) and torch.equal(gradient[0], want_gradient[0])


@pytest.mark.parametrize("n, queries, packed, linear", [
    (128, 4096, False, False), (512, 1024, False, True), (1000, 16, False, False), (100_000, 1, False, True),
    (4096, 64, True, False), (100_000, 1000, True, True), (8191, 1, True, False),
])  # fmt: skip
def test_auto_goes_by_shapes(n, queries, packed, linear):
    shape = (n,) if packed else (queries, n)
    student = torch.empty(shape, device="meta")
    cu_seqlens = torch.empty(queries + 1, dtype=torch.int32, device="meta") if packed else None
    assert backend._in_linear_time(pile_fast.batch.RankingBatch(student_logits=student, cu_seqlens=cu_seqlens)) == linear


def test_bitwise_repeatable(launches):
    z, t, y, _ = contract.make(40, 2, 3)
    first, again = (contract.loss_and_gradient(z, t, y, None, alpha=0.5, iterations=2, **HOW) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_more_than_128_teachers_are_refused():
    with pytest.raises(RuntimeError, match="backend 'triton' takes at most 128 teachers, got 129"):
        pile_fast.pile_ensemble(torch.zeros(1, 4, 129), torch.zeros(1, 4), backend="triton")
