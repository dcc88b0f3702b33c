"""The Triton kernels through Triton's interpreter: the battery of test_battery.py and the numerics contract of
test_contract.py.

test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1: the switch is read when triton is imported.
"""

import importlib.util
import itertools
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


battery, contract = _load("test_battery"), _load("test_contract")
globals().update({k: v for k, v in vars(battery).items() if k.startswith("test_") or k == "granularity"})
# The first two say below what holds for sums that follow the padding, and in float32; the third takes half a minute.
del test_padding_width_changes_nothing, test_the_label_loss_falls_with_small_steps  # noqa: F821
del test_between_lowest_and_highest_teacher  # noqa: F821
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


def test_padding_width_changes_little(loss, how):
    z, t, y = battery.batch()
    value, gradient = battery.run(loss, z, t, y, **how)
    mask = torch.zeros(3, 50, dtype=torch.bool)
    mask[:, 4:25] = True
    wide = [torch.full((3, 50, *x.shape[2:]), fill, dtype=x.dtype) for x, fill in ((z, torch.nan), (t, 1e30), (y, 9))]
    for to, x in zip(wide, (z, t, y), strict=True):
        to[:, 4:25] = x
    wide_value, wide_gradient = battery.run(loss, *wide, mask=mask, **how)
    battery.same(wide_value, value)
    battery.same(wide_gradient[mask].view(3, 21), gradient)
    assert (wide_gradient[~mask] == 0).all()


def test_the_label_loss_falls(how, granularity):
    _, t, y = battery.batch(2, 20)
    t[torch.rand(t.shape) < 0.4] = torch.nan
    trace = pile_fast.pile_ensemble(t, y, granularity=granularity, step_size=0.3, return_trace=True, **how).trace
    assert (trace.diff(dim=1) <= 1e-6).all() and (trace[:, -1] < trace[:, 0] - 1e-3).all()


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
DATA = [
    dict(),
    dict(missing=0.4, unlabelled=0.3, masked=0.3),
    dict(missing=0.9, labels="continuous"),
    dict(unlabelled=1.0),
]


@pytest.mark.parametrize("case", ENSEMBLES, ids=str)
def test_ensemble_contract(case, granularity, launches):
    n, teachers, queries, options = case
    for seed, data in enumerate(DATA if n == 7 else DATA[n % 2 :: 2]):
        _, t, y, mask = contract.make(n, queries, teachers, seed=seed, **data)
        full = dict(
            mask=mask, granularity=granularity, return_weights=True, return_trace=seed % 2 == 1, **{"iterations": 3} | options
        )
        want = pile_fast.pile_ensemble(t.double(), y, backend="torch", **full)
        same = pile_fast.pile_ensemble(t, y, backend="torch", **full)
        got = pile_fast.pile_ensemble(t, y, **full, **HOW)
        for a, b, c in zip(got, same, want, strict=True):
            if a is not None:
                contract.close(a, b, c, 2e-6 * contract.scale_of(t))


LOSSES = list(
    itertools.product(
        (0.0, 0.3, 1.0), ("logistic", "mse"), (0.5, 1.0), (None, "label_gap", "gain_gap"), ("mean", "sum", "none")
    )
)


@pytest.mark.parametrize("n", [1, 2, 7, 33])
@pytest.mark.parametrize("spread", [0.1, 5.0, 100.0])
def test_loss_contract(n, spread, launches):
    for number, values in enumerate(LOSSES[n % 40 :: 40]):
        options = dict(
            zip(("alpha", "distillation", "distillation_temperature", "pair_weight", "reduction"), values, strict=True)
        )
        data = DATA[number % len(DATA)]
        z, t, y, mask = contract.make(n, 2, 3, spread=spread, seed=number, **data)
        options["iterations"] = 2
        want, want_gradient = contract.loss_and_gradient(z.double(), t.double(), y, mask, backend="torch", **options)
        same, same_gradient = contract.loss_and_gradient(z, t, y, mask, backend="torch", **options)
        got, gradient = contract.loss_and_gradient(z, t, y, mask, **HOW, **options)
        contract.close(got, same, want, 2e-6 * max(1.0, want.abs().max().item()))
        contract.close(gradient, same_gradient, want_gradient, 1e-5 * want_gradient.abs().max().item() + 1e-37)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [5, 40])
def test_half(how, dtype, n):
    contract.test_half_inputs_are_read_as_such_and_computed_in_float32(how, dtype, n)


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("normalize", ["zscore", "none"])
def test_huge_logits(how, size, normalize):
    contract.test_huge_logits_stay_finite_and_in_range(how, size, normalize)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float64, torch.bfloat16]
)
def test_labels_of_any_dtype(how, dtype):
    contract.test_labels_of_any_real_dtype(how, dtype)


def test_labels_that_only_float64_tells_apart(how):
    contract.test_labels_that_only_float64_tells_apart(how)


def test_strides(how):
    contract.test_strides_do_not_matter(how)


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
        (100, 5.0, dict(labels="continuous"), dict(alpha=0.5, distillation_temperature=0.5, reduction="sum")),
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
    loss = pile_fast.pairwise_logistic_loss(z, y, **LINEAR)
    (gradient,) = torch.autograd.grad(loss, z)
    wide = z.detach().double().requires_grad_()
    want = pile_fast.pairwise_logistic_loss(wide, y, backend="torch")
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


def test_what_it_cannot_do_it_says():
    z, t, y, _ = contract.make(4)
    with pytest.raises(RuntimeError, match="backend 'triton' computes in float32, got float64"):
        pile_fast.pile_loss(z.double(), t, y, backend="triton")
    with pytest.raises(RuntimeError, match="backend 'triton' takes at most 128 teachers, got 129"):
        pile_fast.pile_ensemble(torch.zeros(1, 4, 129), y[:1], backend="triton")


def test_auto_never_picks_it_on_a_cpu():
    from pile_fast.backends import select

    assert select("auto", pile_fast.batch.RankingBatch(student_logits=torch.zeros(1, 1))) != "triton"


def test_compiles_as_one_graph():
    z, t, y, _ = contract.make(9)
    compiled = torch.compile(lambda z: pile_fast.pile_loss(z, t, y, **HOW), fullgraph=True, backend="aot_eager")
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    compiled(a).backward()
    pile_fast.pile_loss(b, t, y, **HOW).backward()
    assert torch.equal(a.grad, b.grad)
