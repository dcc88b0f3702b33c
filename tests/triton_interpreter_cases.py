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
    for number, values in enumerate(LOSSES[n % 25 :: 25]):
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


def test_packed_lists_longer_than_a_block(launches):
    z, t, y, _ = contract.make(90, 1, 3, missing=0.2, unlabelled=0.1)
    cu_seqlens = torch.tensor([0, 0, 50, 51, 51, 85])
    options = dict(cu_seqlens=cu_seqlens, return_weights=True, return_trace=True, iterations=2)
    for granularity in ("document", "query"):
        got = pile_fast.pile_ensemble(t[0], y[0], granularity=granularity, **options, **HOW)
        want = pile_fast.pile_ensemble(t[0].double(), y[0], granularity=granularity, backend="torch", **options)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=4e-6, equal_nan=True)


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
    with pytest.raises(NotImplementedError, match="chebyshev"):
        pile_fast.pile_loss(z, t, y, backend="triton", pairwise="chebyshev")


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
