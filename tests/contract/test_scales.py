"""Offsets, scales, temperatures and labels of any size against float64, and what counts as missing.

The inputs come from the field: likelihoods of 1e-25, ratings of 1e6 and more, logits of a student that has drifted, labels of
hundreds, an overflow in a teacher's half precision.
"""

import dataclasses

import pytest
import torch
from contract.problems import INF, NAN, SCALES, batch, check_loss, close, largest, make, relative_error, run, same, terms_of

import pile_fast
from pile_fast import distillation_loss, pile_loss, ranking_loss, terms

TERMS = [terms.find(kind, "kind", name) for kind in ("distill", "label") for name in terms.names(kind)]
# (offset, spread, temperature) of the student and its targets.
STUDENTS = [
    (0.0, 1.0, 1.0), (1e4, 0.01, 0.1), (-1e4, 1.0, 0.01), (1e6, 1.0, 1.0), (1e7, 1.0, 1.0), (0.0, 1e-3, 100.0),
    (0.0, 1e-30, 1e-2), (3e4, 100.0, 100.0),
]  # fmt: skip


@pytest.fixture
def lengths(how, target):
    """Not the longest for the reference itself, whose memory is n x n."""
    return [n for n in target.scale_lengths if n < 100 or how["backend"] != "torch"]


# -- logits


def check_teachers(how, n, offset, scale, normalize):
    _, t, y, _ = make(n, missing=0.2, seed=n)
    t = offset + scale * t
    # By document: with logits of 1e25 as they are, a rounding of shared weights decides between teachers.
    options = dict(normalize=normalize, iterations=3, granularity="document")
    if normalize != "zscore":
        options["temperature"] = min(100 * scale, 1e30)
    want, own = (pile_fast.pile_ensemble(x, y, backend="torch", **options).logits for x in (t.double(), t))
    got = pile_fast.pile_ensemble(t, y, **how, **options).logits
    assert relative_error(own, want) <= 4e-6
    assert relative_error(got, want) <= max(4e-6, 3 * relative_error(own, want))


@pytest.mark.parametrize("offset, scale", SCALES)
@pytest.mark.parametrize("normalize", ["zscore", "center", "none"])
def test_teachers_of_any_offset_and_scale(how, lengths, offset, scale, normalize):
    for n in lengths:
        check_teachers(how, n, offset, scale, normalize)


def check_students(how, n, offset, spread, temperature, term):
    z, t, y, _ = make(n, 1, 1, seed=n)
    z, s = offset + spread * z, 3 * offset + spread * t[..., 0]
    s[:, :1] = NAN
    if term.kind == "label":
        check_loss(lambda z, s, y, **kw: ranking_loss(z, y, kind=term, **kw), z, s, y, how)
        return
    if term.name == "mse" and spread < 1e-20:
        return  # its squares are beyond float32
    if "temperature" in term.names:
        term = dataclasses.replace(term, temperature=temperature)
    check_loss(lambda z, s, y, **kw: distillation_loss(z, s, kind=term, **kw), z, s, y, how)


@pytest.mark.parametrize("offset, spread, temperature", STUDENTS)
def test_students_of_any_offset_and_temperature(how, lengths, offset, spread, temperature):
    for term in TERMS:
        for n in lengths:
            check_students(how, n, offset, spread, temperature, term)


@pytest.mark.needs("linear")
def test_long_lists_of_any_offset_and_scale(linear):
    how, n = linear
    for offset, scale, normalize in ((0.0, 1e-25, "zscore"), (1e6, 1.0, "zscore"), (1e6, 1.0, "none")):
        check_teachers(how, n, offset, scale, normalize)
    for term in TERMS:
        check_students(how, n, 1e4, 0.01, 0.1, term)
    check_labels(how, n, "gain_gap", 127)


def test_likelihoods_and_ratings(how):
    likelihoods = torch.tensor([1e-25, 3e-25, 2e-25])[None, :, None]
    got = pile_fast.pile_ensemble(likelihoods, torch.zeros(1, 3), **how).logits
    same(got, torch.tensor([[-1.2247449, 1.2247449, 0.0]]), rtol=1e-6, atol=1e-6)
    ratings = 1e6 + (torch.arange(40.0) % 4)[None, :, None]
    got = pile_fast.pile_ensemble(ratings, torch.zeros(1, 40), **how).logits
    same(got[0, :4], torch.tensor([-1.3416408, -0.4472136, 0.4472136, 1.3416408]), rtol=1e-6, atol=0)


@pytest.mark.needs("float64")
@pytest.mark.parametrize("offset, scale", SCALES)
def test_z_scores_in_double_do_not_depend_on_offset_and_scale(how, offset, scale):
    t = torch.tensor([[[0.0], [1.0], [2.0], [4.0]]], dtype=torch.float64)
    want = (t - t.mean()) / t.std(correction=0)
    got = pile_fast.pile_ensemble(offset + scale * t, torch.zeros(1, 4), **how).logits
    torch.testing.assert_close(got, want[..., 0], rtol=1e-9 + 1e-15 * abs(offset) / scale, atol=0)


@pytest.mark.needs("float64")
@pytest.mark.parametrize("t", [[5e-324, 0.0, 1e-323], [1.7e308, -1e308, 0.0], [1e-200, 3e-200, 2e-200], [1e200, 3e200, 2e200]])
def test_float64_at_its_ends(how, t):
    t = torch.tensor(t, dtype=torch.float64)[None, :, None]
    got, want = (pile_fast.pile_ensemble(t, torch.zeros(1, 3), **own).logits for own in (how, dict(backend="torch")))
    assert want.isfinite().all() and abs(want.std(correction=0).item() - 1) < 1e-9
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.needs("fast")
@pytest.mark.parametrize("temperature", [0.01, 0.1, 100.0])
def test_ensembles_at_any_temperature(how, lengths, temperature):
    for n in lengths:
        _, t, y, _ = make(n, seed=n)
        t = t + 1e4
        for normalize in ("zscore", "none"):
            options = dict(temperature=temperature, normalize=normalize, iterations=2)
            want, own = (pile_fast.pile_ensemble(x, y, backend="torch", **options).logits for x in (t.double(), t))
            got = pile_fast.pile_ensemble(t, y, **how, **options).logits
            close(got, own, want, 2e-6 * largest(want))


# -- labels


def check_labels(how, n, pair_weight, shift=0.0, scale=1.0):
    z, t, y, _ = make(n, unlabelled=0.1, seed=n)
    options = dict(alpha=0.5, pair_weight=pair_weight, iterations=3)
    want, want_gradient = run(pile_loss, z.double(), t.double(), y, backend="torch", **options)
    for labels in (y * scale + shift, (y * scale + shift).double()):
        got, gradient = run(pile_loss, z, t, labels, **how, **options)
        close(got, want, want, 1e-5)
        close(gradient, want_gradient, want_gradient, 2e-5 * largest(want_gradient))


@pytest.mark.parametrize(
    "pair_weight, shift", [("gain_gap", 127), ("gain_gap", 1024), ("gain_gap", 1e6), ("gain_gap", -200), ("label_gap", 1e6)]
)
def test_labels_of_any_size(how, lengths, pair_weight, shift):
    """Pairs weigh by ratios: labels may be shifted, and for "label_gap" stretched, without any effect."""
    for n in lengths:
        check_labels(how, n, pair_weight, shift)


@pytest.mark.needs("fast")
@pytest.mark.parametrize("scale", [1e-30, 1e30, 8e37])
def test_label_gaps_of_any_size(how, scale):
    check_labels(how, 20, "label_gap", -scale, scale)


UNCOMPARABLE = [
    (torch.tensor([[0.0, 1.0], [INF, 1.0]]), "labels: expected finite numbers, or NaN for unlabelled, got ±inf in query 1"),
    (torch.tensor([[0.0, 1.0], [-INF, 1.0]], dtype=torch.float16), "got ±inf in query 1"),
    (torch.tensor([[2**53, 2**53 + 1], [0, 1]]), "labels: expected integers below 2\\^53, got a larger one in query 0"),
    (torch.tensor([[0, 1], [-(2**60), 1]]), "integers below 2\\^53, got a larger one in query 1"),
    (torch.tensor([[0, 1], [2**64 - 1, 1]], dtype=torch.uint64), "integers below 2\\^53, got a larger one in query 1"),
]


@pytest.mark.needs("host")
@pytest.mark.parametrize("labels, words", UNCOMPARABLE)
def test_labels_that_cannot_be_compared(how, labels, words):
    z, t = torch.randn(2, 2), torch.randn(2, 2, 2)
    calls = [
        lambda: pile_loss(z, t, labels, **how),
        lambda: pile_loss(z, t, labels, alpha=0, **how),
        lambda: pile_fast.pile_ensemble(t, labels, **how),
        *(lambda term=term: ranking_loss(z, labels, kind=term, **how) for term in terms_of("label")),
    ]
    if labels.dtype is not torch.uint64:
        flat = z.view(-1), t.view(-1, 2), labels.view(-1)
        calls.append(lambda: pile_loss(*flat, cu_seqlens=torch.tensor([0, 2, 4]), **how))
    for call in calls:
        with pytest.raises(ValueError, match=words):
            call()
    mask = torch.ones(2, 2, dtype=torch.bool)
    mask[labels.double().abs() >= 2**53] = False
    for term in terms_of("label"):
        assert ranking_loss(z, labels.double(), kind=term, mask=mask, **how).isfinite()  # what lies under it is not read


@pytest.mark.needs("kernels")
def test_infinite_labels_order_nothing(how):
    """On a device nobody looks for them beforehand: they are as good as unlabelled."""
    z, t, y = batch(2, 9)
    infinite, unlabelled = y.float(), y.float()
    infinite[0, 2], infinite[1, 5] = INF, -INF
    unlabelled[0, 2] = unlabelled[1, 5] = NAN
    for pair_weight in (None, "gain_gap"):
        options = dict(alpha=0.5, iterations=2, pair_weight=pair_weight, **how)
        a, b = (run(pile_loss, z, t, x, **options) for x in (infinite, unlabelled))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_labels(how, dtype):
    z, y = torch.randn(2, 6), torch.randint(0, 5, (2, 6))
    for term in terms_of("label"):
        assert torch.equal(*(ranking_loss(z, labels, kind=term, **how) for labels in (y.to(dtype), y)))


# -- what is not finite


def test_an_infinite_teacher_logit_counts_as_missing(how, lengths):
    for n in lengths:
        z, t, y, where = make(max(n, 3), missing=0.1, masked=0.1)
        broken, missing = t.clone(), t.clone()
        for value, at in ((INF, (0, 1, 0)), (-INF, (1, 0, 2)), (INF, (1, len(t[0]) - 1, 1))):
            broken[at], missing[at] = value, NAN
        for options in (dict(), dict(granularity="query"), dict(normalize="none"), dict(normalize="center")):
            options |= dict(return_weights=True, return_trace=True, iterations=3, **where, **how)
            a, b = (pile_fast.pile_ensemble(x, y, **options) for x in (broken, missing))
            assert all(torch.equal(x.nan_to_num(-7), w.nan_to_num(-7)) for x, w in zip(a, b, strict=True))
        a, b = (run(pile_loss, z, x, y, alpha=0.5, iterations=3, **where, **how) for x in (broken, missing))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[0] > 0
        for term in terms_of("distill"):
            a, b = (distillation_loss(z, x[..., 0], kind=term, **where, **how) for x in (broken, missing))
            assert torch.equal(a, b)


def test_half_precision_that_overflowed(how):
    t = torch.tensor([[[7e4, 1.0], [2.0, 0.5], [1.0, 0.2]]]).half()  # 7e4 is inf
    out = pile_fast.pile_ensemble(t, torch.tensor([[2, 1, 0]]), granularity="document", return_weights=True, **how)
    assert out.logits.isfinite().all() and out.weights[0, 0, 0] == 0
