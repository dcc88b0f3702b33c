"""Offsets, scales, temperatures and labels of any size: every backend against float64, and what counts as missing.

The inputs come from the field: likelihoods of 1e-25, ratings of 1e6 and more, logits of a student that has drifted, labels of
hundreds, an overflow in a teacher's half precision. gpu_contract_cases.py asks the GPU kernels the same.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

import pile_fast
from pile_fast import ensembles
from pile_fast.backends import cpp


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


contract = _load("test_contract")
how = contract.how
INF, NAN = float("inf"), float("nan")

# (offset, scale) of the teachers: offsets up to 1e7 times the spread, scales over most of float32.
SCALES = [(0.0, 1e-30), (0.0, 1e-25), (1e-3, 1e-10), (0.0, 1.0), (1e6, 1.0), (-1e7, 1.0), (0.0, 1e30), (1e30, 1e25)]
# (offset, spread, temperature) of the student and its targets.
STUDENTS = [
    (0.0, 1.0, 1.0), (1e4, 0.01, 0.1), (-1e4, 1.0, 0.01), (1e6, 1.0, 1.0), (1e7, 1.0, 1.0), (0.0, 1e-3, 100.0),
    (0.0, 1e-30, 1e-2), (3e4, 100.0, 100.0),
]  # fmt: skip
LENGTHS = [2, 7, 40, 300]


def relative_error(got, want):
    assert (got.isnan() == want.isnan()).all()
    return ((got.double() - want).abs().nan_to_num().max() / want.abs().nan_to_num().max().clamp(min=1e-300)).item()


def student_loss(logits, loss, **how):
    logits = logits.clone().requires_grad_()
    value = loss(logits, **how)
    value.backward()
    return value.detach(), logits.grad


@pytest.mark.parametrize("offset, scale", SCALES)
@pytest.mark.parametrize("normalize", ["zscore", "center", "none"])
def test_teachers_of_any_offset_and_scale(how, offset, scale, normalize):  # A9
    for n in LENGTHS:
        _, t, y, _ = contract.make(n, 2, 3, missing=0.2, seed=n)
        t = offset + scale * t
        options = dict(normalize=normalize, iterations=3)
        if normalize != "zscore":
            options["temperature"] = min(100 * scale, 1e30)
        want = pile_fast.pile_ensemble(t.double(), y, backend="torch", **options).logits
        same = pile_fast.pile_ensemble(t, y, backend="torch", **options).logits
        got = pile_fast.pile_ensemble(t, y, **how, **options).logits
        assert relative_error(got, want) <= max(4e-6, 3 * relative_error(same, want))
        assert relative_error(same, want) <= 4e-6


@pytest.mark.parametrize("offset, scale", SCALES)
def test_what_float64_calibrates_to_is_what_it_should_be(offset, scale):
    """The reference itself: z-scores do not depend on offset and scale."""
    t = torch.tensor([[[0.0], [1.0], [2.0], [4.0]]], dtype=torch.float64)
    y = torch.zeros(1, 4)
    want = (t - t.mean()) / t.std(correction=0)
    for backend in ("torch",) if cpp.unavailable() else ("torch", "cpp"):
        got = pile_fast.pile_ensemble(offset + scale * t, y, backend=backend).logits
        torch.testing.assert_close(got, want[..., 0], rtol=1e-9 + 1e-15 * abs(offset) / scale, atol=0)


@pytest.mark.parametrize("t", [[5e-324, 0.0, 1e-323], [1.7e308, -1e308, 0.0], [1e-200, 3e-200, 2e-200], [1e200, 3e200, 2e200]])
def test_float64_at_its_ends(t):
    if cpp.unavailable():
        pytest.skip(cpp.unavailable())
    logits = [
        pile_fast.pile_ensemble(torch.tensor(t, dtype=torch.float64)[None, :, None], torch.zeros(1, 3), backend=b).logits
        for b in ("torch", "cpp")
    ]
    assert logits[0].isfinite().all() and abs(logits[0].std(correction=0).item() - 1) < 1e-9
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-12)


def test_the_cases_that_were_wrong(how):  # A9, A10
    likelihoods = torch.tensor([1e-25, 3e-25, 2e-25])[None, :, None]
    got = pile_fast.pile_ensemble(likelihoods, torch.zeros(1, 3), **how).logits
    torch.testing.assert_close(got, torch.tensor([[-1.2247449, 1.2247449, 0.0]]), rtol=1e-6, atol=1e-6)
    ratings = 1e6 + (torch.arange(40.0) % 4)[None, :, None]
    got = pile_fast.pile_ensemble(ratings, torch.zeros(1, 40), **how).logits
    torch.testing.assert_close(got[0, :4], torch.tensor([-1.3416408, -0.4472136, 0.4472136, 1.3416408]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", sorted(set(ensembles.ENSEMBLES) - ensembles.NEEDS_STUDENT))
@pytest.mark.parametrize("offset, scale", SCALES)
def test_the_other_ensembles_calibrate_as_well(method, offset, scale):
    _, t, y, _ = contract.make(12, 2, 3, missing=0.2)
    t = (offset + scale * t).float()
    want = ensembles.ENSEMBLES[method](t.double(), y).logits
    assert relative_error(ensembles.ENSEMBLES[method](t, y).logits, want) <= 1e-5


@pytest.mark.parametrize("offset, spread, temperature", STUDENTS)
@pytest.mark.parametrize("kind", ["logistic", "mse"])
def test_students_of_any_offset_and_temperature(how, offset, spread, temperature, kind):  # A10
    for n in LENGTHS:
        z, t, _, _ = contract.make(n, 1, 1, seed=n)
        z, target = offset + spread * z, 3 * offset + spread * t[..., 0]
        if kind == "mse" and spread < 1e-20:
            continue  # its squares are beyond float32
        target[:, :1] = NAN

        def loss(z, **how):
            return pile_fast.distillation_loss(
                z, target.to(z.dtype), kind=f"logistic:temperature={temperature}" if kind == "logistic" else kind, **how  # noqa: B023
            )  # fmt: skip

        want, want_gradient = student_loss(z.double(), loss, backend="torch")
        same, same_gradient = student_loss(z, loss, backend="torch")
        got, gradient = student_loss(z, loss, **how)
        contract.close(got, same, want, 2e-6 * max(1.0, want.abs().item()))
        contract.close(gradient, same_gradient, want_gradient, 1e-5 * want_gradient.abs().max().item() + 1e-37)


@pytest.mark.parametrize("offset, spread, temperature", STUDENTS)
def test_label_losses_of_any_offset(how, offset, spread, temperature):
    for n in LENGTHS:
        z, _, y, _ = contract.make(n, 1, 1, seed=n)
        z = offset + spread * z

        def loss(z, **how):
            return pile_fast.ranking_loss(z, y, **how)  # noqa: B023

        want, want_gradient = student_loss(z.double(), loss, backend="torch")
        got, gradient = student_loss(z, loss, **how)
        contract.close(got, want, want, 2e-6 * max(1.0, want.abs().item()))
        contract.close(gradient, want, want_gradient, 1e-5 * want_gradient.abs().max().item() + 1e-37)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 100.0])
def test_ensembles_at_any_temperature(how, temperature, granularity="document"):
    for n in LENGTHS:
        _, t, y, _ = contract.make(n, 2, 3, seed=n)
        t = t + 1e4
        for normalize in ("zscore", "none"):
            options = dict(temperature=temperature, normalize=normalize, iterations=2)
            want = pile_fast.pile_ensemble(t.double(), y, backend="torch", **options).logits
            same = pile_fast.pile_ensemble(t, y, backend="torch", **options).logits
            got = pile_fast.pile_ensemble(t, y, **how, **options).logits
            contract.close(got, same, want, 2e-6 * want.abs().max().item())


# -- labels


LABELS = [("gain_gap", 127), ("gain_gap", 1024), ("gain_gap", 1e6), ("gain_gap", -200), ("label_gap", 1e6)]


@pytest.mark.parametrize("pair_weight, shift", LABELS)
def test_labels_of_any_size(how, pair_weight, shift):  # A4
    """Pairs weigh by ratios: labels may be shifted, and for "label_gap" stretched, without any effect."""
    for n in LENGTHS:
        z, t, y, _ = contract.make(n, 2, 3, unlabelled=0.1, seed=n)
        options = dict(alpha=0.5, pair_weight=pair_weight, iterations=3)
        want, want_gradient = contract.loss_and_gradient(z.double(), t.double(), y, None, backend="torch", **options)
        for labels in (y + shift, (y + shift).double()):
            got, gradient = contract.loss_and_gradient(z, t, labels, None, **how, **options)
            contract.close(got, want, want, 1e-5)
            contract.close(gradient, want, want_gradient, 2e-5 * want_gradient.abs().max().item())


@pytest.mark.parametrize("scale", [1e-30, 1e30, 8e37])
def test_label_gaps_of_any_size(how, scale):
    z, t, y, _ = contract.make(20, 2, 3)
    options = dict(alpha=0.5, pair_weight="label_gap", iterations=3)
    want, want_gradient = contract.loss_and_gradient(z.double(), t.double(), y, None, backend="torch", **options)
    got, gradient = contract.loss_and_gradient(z, t, y * scale - scale, None, **how, **options)
    contract.close(got, want, want, 1e-5)
    contract.close(gradient, want, want_gradient, 2e-5 * want_gradient.abs().max().item())


@pytest.mark.parametrize("labels, words", [
    (torch.tensor([[0.0, 1.0], [INF, 1.0]]), "labels: expected finite numbers, or NaN for unlabelled, got ±inf in query 1"),
    (torch.tensor([[0.0, 1.0], [-INF, 1.0]], dtype=torch.float16), "got ±inf in query 1"),
    (torch.tensor([[2**53, 2**53 + 1], [0, 1]]), "labels: expected integers below 2\\^53, got a larger one in query 0"),
    (torch.tensor([[0, 1], [-(2**60), 1]]), "integers below 2\\^53, got a larger one in query 1"),
    (torch.tensor([[0, 1], [2**64 - 1, 1]], dtype=torch.uint64), "integers below 2\\^53, got a larger one in query 1"),
])  # fmt: skip
def test_labels_that_cannot_be_compared(how, labels, words):
    z, t = torch.randn(2, 2), torch.randn(2, 2, 2)
    calls = [
        lambda: pile_fast.pile_loss(z, t, labels, **how),
        lambda: pile_fast.pile_loss(z, t, labels, alpha=0, **how),
        lambda: pile_fast.pile_ensemble(t, labels, **how),
        lambda: pile_fast.ranking_loss(z, labels, **how),
        lambda: pile_fast.pile_loss(z.view(-1), t.view(-1, 2), labels.view(-1), cu_seqlens=torch.tensor([0, 2, 4]), **how),
    ]
    for call in calls if labels.dtype is not torch.uint64 else calls[:4]:
        with pytest.raises(ValueError, match=words):
            call()
    mask = torch.ones(2, 2, dtype=torch.bool)
    mask[labels.double().abs() >= 2**53] = False
    assert pile_fast.ranking_loss(z, labels.double(), mask=mask, **how).isfinite()  # what lies under it is not read


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_labels(how, dtype):
    z, y = torch.randn(2, 6), torch.randint(0, 5, (2, 6))
    got = pile_fast.ranking_loss(z, y.to(dtype), **how)
    assert torch.equal(got, pile_fast.ranking_loss(z, y, **how))


# -- what is not finite


@pytest.mark.parametrize("value", [INF, -INF])
@pytest.mark.parametrize("n", [3, 20, 300])
def test_an_infinite_teacher_logit_counts_as_missing(how, value, n):  # A5
    z, t, y, mask = contract.make(n, 2, 3, missing=0.1, masked=0.1)
    broken, missing = t.clone(), t.clone()
    for where in ((0, 1, 0), (1, 0, 2), (1, n - 1, 1)):
        broken[where], missing[where] = value, NAN
    for options in (dict(), dict(granularity="query"), dict(normalize="none"), dict(normalize="center")):
        a = pile_fast.pile_ensemble(
            broken, y, mask=mask, return_weights=True, return_trace=True, iterations=3, **how, **options
        )
        b = pile_fast.pile_ensemble(
            missing, y, mask=mask, return_weights=True, return_trace=True, iterations=3, **how, **options
        )
        assert all(torch.equal(x.nan_to_num(-7), w.nan_to_num(-7)) for x, w in zip(a, b, strict=True))
    a = contract.loss_and_gradient(z, broken, y, mask, alpha=0.5, iterations=3, **how)
    b = contract.loss_and_gradient(z, missing, y, mask, alpha=0.5, iterations=3, **how)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[0] > 0
    targets = [
        pile_fast.distillation_loss(z, x[..., 0], mask=mask, kind=kind, **how)
        for kind in ("logistic", "mse")
        for x in (broken, missing)
    ]
    assert targets[0] == targets[1] and targets[2] == targets[3]


def test_half_precision_that_overflowed(how):
    t = torch.tensor([[[7e4, 1.0], [2.0, 0.5], [1.0, 0.2]]]).half()  # 7e4 is inf
    out = pile_fast.pile_ensemble(t, torch.tensor([[2, 1, 0]]), return_weights=True, **how)
    assert out.logits.isfinite().all() and out.weights[0, 0, 0] == 0


@pytest.mark.parametrize("method", sorted(ensembles.ENSEMBLES))
def test_the_other_ensembles_take_infinite_logits_for_missing(method):
    z, t, y, _ = contract.make(12, 2, 3)
    broken, missing = t.clone(), t.clone()
    broken[0, 3, 1], missing[0, 3, 1] = INF, NAN
    student = {"student_logits": z} if method in ensembles.NEEDS_STUDENT else {}
    a, b = (ensembles.ENSEMBLES[method](x, y, **student) for x in (broken, missing))
    assert torch.equal(a.logits, b.logits) and torch.equal(a.weights, b.weights)


def test_stacking_and_the_shared_prior_take_infinite_logits_for_missing():
    pytest.importorskip("sklearn")
    _, t, y, _ = contract.make(12, 4, 3)
    broken, missing = t.clone(), t.clone()
    broken[0, 3, 1], missing[0, 3, 1] = -INF, NAN
    a, b = (ensembles.StackingEnsemble().fit(x, y)(x).logits for x in (broken, missing))
    assert torch.equal(a, b)
    assert torch.equal(*(ensembles.shared_prior(x, y) for x in (broken, missing)))
