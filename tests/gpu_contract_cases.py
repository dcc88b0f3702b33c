"""What the kernels of both GPU backends are asked without a GPU: the battery of test_battery.py and the numerics contract of
test_contract.py, in float32 and at sizes that an interpreter or an emulator gets through.

cuda_emulation_cases.py and triton_interpreter_cases.py each take these tests and add what only their backend can be asked.
They define the fixtures

    how            the backend, by name, and its pair sum
    ensemble_case  (n, teachers, queries, options) of an ensemble
    loss_case      (n, every): lists of n documents, asked every so-many-th combination of the losses' options
    long_list      a length that no program takes alone

and those of `FIXTURES` that they do not take from here.
"""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

import pile_fast
from pile_fast.backends import select

FIXTURES = ("granularity", "loss", "ensemble_data")


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


battery, contract, scales = _load("test_battery"), _load("test_contract"), _load("test_scales")
globals().update({k: v for k, v in vars(battery).items() if k.startswith("test_") or k in ("granularity", "loss")})
del test_the_label_loss_falls_with_small_steps  # noqa: F821  (in float64; test_the_label_loss_falls asks it in float32)
del test_between_lowest_and_highest_teacher  # noqa: F821  (50 iterations at 150 documents)
del test_padding_width_changes_nothing  # noqa: F821  (to the last bit; test_padding_width_changes_little)

test_huge_logits_stay_finite_and_in_range = contract.test_huge_logits_stay_finite_and_in_range
test_labels_of_any_real_dtype = contract.test_labels_of_any_real_dtype
test_labels_that_only_float64_tells_apart = contract.test_labels_that_only_float64_tells_apart
test_strides_do_not_matter = contract.test_strides_do_not_matter
scales.LENGTHS[:] = [7]
test_teachers_of_any_offset_and_scale = scales.test_teachers_of_any_offset_and_scale
test_students_of_any_offset_and_temperature = scales.test_students_of_any_offset_and_temperature
test_labels_of_any_size = scales.test_labels_of_any_size
test_half_precision_that_overflowed = scales.test_half_precision_that_overflowed


@pytest.mark.parametrize("value", [scales.INF, -scales.INF], ids=["above", "below"])
def test_an_infinite_teacher_logit_counts_as_missing(how, value):
    scales.test_an_infinite_teacher_logit_counts_as_missing(how, value, 7)


def test_long_lists_of_any_offset_and_scale(how, long_list, monkeypatch):
    monkeypatch.setattr(scales, "LENGTHS", [long_list])
    how = how | {"pairwise": "chebyshev"}
    for offset, scale, normalize in ((0.0, 1e-25, "zscore"), (1e6, 1.0, "zscore"), (1e6, 1.0, "none")):
        scales.test_teachers_of_any_offset_and_scale(how, offset, scale, normalize)
    for kind in ("logistic", "mse"):
        scales.test_students_of_any_offset_and_temperature(how, 1e4, 0.01, 0.1, kind)
    scales.test_labels_of_any_size(how, "gain_gap", 127)


def test_infinite_labels_order_nothing(how):
    """On a device nobody looks for them beforehand: they are as good as unlabelled."""
    z, t, y = battery.batch(2, 9)
    y = y.float()
    infinite, unlabelled = y.clone(), y.clone()
    infinite[0, 2], infinite[1, 5] = scales.INF, -scales.INF
    unlabelled[0, 2] = unlabelled[1, 5] = scales.NAN
    for pair_weight in (None, "gain_gap"):
        options = dict(alpha=0.5, iterations=2, pair_weight=pair_weight)
        a, b = (contract.loss_and_gradient(z, t, x, None, **how, **options) for x in (infinite, unlabelled))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


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


DATA = [
    dict(),
    dict(missing=0.4, unlabelled=0.3, masked=0.3),
    dict(missing=0.9, labels="continuous"),
    dict(unlabelled=1.0),
]


@pytest.fixture
def ensemble_data():
    return DATA


def test_ensemble_contract(ensemble_case, ensemble_data, granularity, how):
    n, teachers, queries, options = ensemble_case
    for seed, data in enumerate(ensemble_data if n == 7 else ensemble_data[n % 2 :: 2]):
        _, t, y, mask = contract.make(n, queries, teachers, seed=seed, **data)
        full = dict(
            mask=mask, granularity=granularity, return_weights=True, return_trace=seed % 2 == 1, **{"iterations": 3} | options
        )
        want = pile_fast.pile_ensemble(t.double(), y, backend="torch", **full)
        same = pile_fast.pile_ensemble(t, y, backend="torch", **full)
        got = pile_fast.pile_ensemble(t, y, **full, **how)
        for a, b, c in zip(got, same, want, strict=True):
            if a is not None:
                contract.close(a, b, c, 2e-6 * contract.scale_of(t))


LOSSES = list(
    itertools.product(
        (0.0, 0.3, 1.0),
        ("logistic:temperature=0.5", "logistic", "mse"),
        (None, "label_gap", "gain_gap"),
        ("mean", "sum", "none"),
    )
)


@pytest.mark.parametrize("spread", [0.1, 5.0, 100.0])
def test_loss_contract(loss_case, spread, how):
    n, every = loss_case
    for number, values in enumerate(LOSSES[n % every :: every]):
        options = dict(zip(("alpha", "distillation", "pair_weight", "reduction"), values, strict=True))
        z, t, y, mask = contract.make(n, 2, 3, spread=spread, seed=number, **DATA[number % len(DATA)])
        options["iterations"] = 2
        want, want_gradient = contract.loss_and_gradient(z.double(), t.double(), y, mask, backend="torch", **options)
        same, same_gradient = contract.loss_and_gradient(z, t, y, mask, backend="torch", **options)
        got, gradient = contract.loss_and_gradient(z, t, y, mask, **how, **options)
        contract.close(got, same, want, 2e-6 * max(1.0, want.abs().max().item()))
        contract.close(gradient, same_gradient, want_gradient, 1e-5 * want_gradient.abs().max().item() + 1e-37)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [5, 40])
def test_half(how, dtype, n):
    contract.test_half_inputs_are_read_as_such_and_computed_in_float32(how, dtype, n)


def test_float64_is_refused_by_name(how):
    z, t, y, _ = contract.make(4)
    with pytest.raises(RuntimeError, match=f"backend '{how['backend']}' computes in float32, got float64"):
        pile_fast.pile_loss(z.double(), t, y, **how)


def test_auto_never_picks_it_on_a_cpu(how):
    z, t, y, _ = contract.make(4)
    chosen = select("auto", pile_fast.batch.RankingBatch(student_logits=z))
    assert chosen != how["backend"]
    assert torch.equal(pile_fast.pile_loss(z, t, y), pile_fast.pile_loss(z, t, y, backend=chosen))


def test_compiles_as_one_graph(how):
    z, t, y, _ = contract.make(9)
    compiled = torch.compile(lambda z: pile_fast.pile_loss(z, t, y, **how), fullgraph=True, backend="aot_eager")
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    compiled(a).backward()
    pile_fast.pile_loss(b, t, y, **how).backward()
    assert torch.equal(a.grad, b.grad)
