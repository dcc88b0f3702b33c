"""Metrics: hand-computed values, other libraries, brute force over pairs, and the two layouts."""

import math
import time
import warnings

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from sklearn.metrics import average_precision_score, label_ranking_average_precision_score, ndcg_score, roc_auc_score

from pile_fast.evaluation.metrics import average_precision, mrr, ndcg, opa, pair_counts, pnr

NAN = math.nan
RANKED = {"ndcg": ndcg, "mrr": mrr, "average_precision": average_precision}
# Every metric with options that make it pass through its less travelled lines.
ALL = {
    "ndcg": lambda *a, **k: ndcg(*a, ties="average", k=3, **k),
    "mrr": lambda *a, **k: mrr(*a, k=2, **k),
    "average_precision": lambda *a, **k: average_precision(*a, k=3, **k),
    "opa": lambda *a, **k: opa(*a, ties="half", **k),
    "pnr": lambda *a, reduction="mean", **k: pnr(*a, average="none" if reduction == "none" else "micro", **k),
}
every_metric = pytest.mark.parametrize("metric", ALL.values(), ids=ALL.keys())


def lists(seed=0, queries=12, width=9, dtype=torch.float32):
    """Coarse scores and labels with many ties, unlabelled documents, and queries of every length from 0 on."""
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 4, (queries, width), generator=rng).to(dtype) / 2
    labels = torch.randint(0, 3, (queries, width), generator=rng).float()
    labels[torch.rand(queries, width, generator=rng) < 0.15] = NAN
    mask = torch.arange(width) < (torch.arange(queries) % (width + 1))[:, None]
    return scores, labels, mask


def packed(scores, labels, mask):
    return scores[mask], labels[mask], torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()


def brute_counts(scores, labels):
    ordered = labels[:, None] > labels[None, :]
    difference = scores[:, None] - scores[None, :]
    return [int((ordered & sign).sum()) for sign in (difference > 0, difference < 0, difference == 0)]


def test_ndcg_by_hand():
    scores, labels = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[1, 2, 0]])
    # Ranked: 1, 0, 2; ideal: 2, 1, 0.
    exponential = (1 + 3 / 2) / (3 + 1 / math.log2(3))
    assert ndcg(scores, labels).item() == pytest.approx(exponential, abs=1e-15)
    assert ndcg(scores, labels, gain="linear").item() == pytest.approx((1 + 1) / (2 + 1 / math.log2(3)), abs=1e-15)
    assert ndcg(scores, labels, k=1).item() == pytest.approx(1 / 3, abs=1e-15)


def test_ndcg_ties():
    labels = torch.tensor([[0, 1]])
    tied = torch.zeros(1, 2)
    assert ndcg(tied, labels).item() == pytest.approx(1 / math.log2(3))  # keeps the order given
    assert ndcg(tied, labels, ties="average").item() == pytest.approx((1 + 1 / math.log2(3)) / 2)
    assert ndcg(torch.tensor([[0.0, -0.0]]), labels, ties="average").item() == pytest.approx((1 + 1 / math.log2(3)) / 2)


@pytest.mark.parametrize("gain", ["exponential", "linear"])
def test_labels_below_zero_gain_nothing(gain):  # B2
    scores, labels = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[-2, 2, 1]])
    assert torch.equal(ndcg(scores, labels, gain=gain), ndcg(scores, labels.clamp(min=0), gain=gain))
    assert ndcg(scores, torch.tensor([[-2, -1, 0]]), gain=gain).item() == 0  # as of a query without a relevant document
    assert ndcg(scores, torch.tensor([[-2, -1, 0]]), gain=gain, empty="skip").isnan()


@pytest.mark.parametrize("largest", [127, 300, 1023, 1024, 1e6, 1e300])
def test_no_label_is_too_large(largest):  # B2
    """A label that is a little smaller earns its share of the largest one's gain, however large the two are."""
    scores = torch.tensor([[3.0, 2.0, 1.0]])
    labels = torch.tensor([[largest - 1, 0, largest]], dtype=torch.float64)
    share = 0.5 if largest < 1e9 else 1.0  # of the largest gain; beyond, a difference of 1 is lost in a float64
    wanted = (share + 1 / 2) / (1 + share / math.log2(3))
    assert ndcg(scores, labels).item() == pytest.approx(wanted, abs=1e-12)
    wanted = (1 - 1 / largest + 1 / 2) / (1 + (1 - 1 / largest) / math.log2(3))
    assert ndcg(scores, labels, gain="linear").item() == pytest.approx(wanted, abs=1e-12)
    assert mrr(scores, labels).item() == 1 and average_precision(scores, labels).item() == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("gain", ["exponential", "linear"])
@pytest.mark.parametrize("scale", [1e-300, 1e-20])
def test_no_label_is_too_small(gain, scale):
    scores, labels = torch.tensor([[3.0, 2.0]]), torch.tensor([[0, 1]], dtype=torch.float64) * scale
    assert ndcg(scores, labels, gain=gain).item() == pytest.approx(1 / math.log2(3))


def test_what_was_not_returned_earns_nothing_but_is_missed():  # A12
    labels = torch.tensor([[0, 1, 2, 1, NAN]])
    scores = torch.tensor([[3.0, 2.0, NAN, NAN, NAN]])
    retrieved = torch.tensor([[True, True, False, False, True]])
    options = {"retrieved": retrieved}
    ideal = 2 + 1 / math.log2(3) + 1 / 2
    assert ndcg(scores, labels, gain="linear", **options).item() == pytest.approx(1 / math.log2(3) / ideal)
    assert ndcg(scores, labels, gain="linear", ties="average", **options).item() == pytest.approx(1 / math.log2(3) / ideal)
    assert average_precision(scores, labels, **options).item() == pytest.approx(1 / 2 / 3)
    assert mrr(scores, labels, **options).item() == 1 / 2 and mrr(scores, labels, relevant_at=2, **options).item() == 0
    # It is last also where the others' scores are -inf.
    lowest = torch.full((1, 5), -math.inf)
    assert (
        mrr(lowest, torch.tensor([[2, 0, 0, 0, 1]]), retrieved=torch.tensor([[False, True, True, True, True]])).item() == 1 / 4
    )


def test_not_returned_is_the_same_packed_and_padded():
    scores, labels, mask = lists()
    retrieved = torch.rand(scores.shape) < 0.6
    flat = packed(scores, labels, mask)
    for metric in RANKED.values():
        a = metric(scores, labels, mask=mask, retrieved=retrieved, reduction="none")
        b = metric(*flat[:2], cu_seqlens=flat[2], retrieved=retrieved[mask], reduction="none")
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) and not torch.equal(
            a, metric(scores, labels, mask=mask, reduction="none")
        )


@pytest.mark.parametrize("k", [None, 1, 4, 100])
def test_ndcg_is_sklearns(k):
    rng = np.random.default_rng(1)
    for scores in (rng.normal(size=(6, 11)), rng.integers(0, 3, (6, 11)).astype(float)):
        labels = rng.integers(0, 4, (6, 11))
        given = torch.tensor(scores), torch.tensor(labels)
        wanted = ndcg_score(labels, scores, k=k)
        assert ndcg(*given, gain="linear", ties="average", k=k).item() == pytest.approx(wanted, abs=1e-12)
        wanted = ndcg_score(2.0**labels - 1, scores, k=k)
        assert ndcg(*given, ties="average", k=k).item() == pytest.approx(wanted, abs=1e-12)


def test_mrr_and_average_precision_by_hand():
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    labels = torch.tensor([[0, 1, 0, 2], [2, 0, 0, 0]])
    assert mrr(scores, labels, reduction="none").tolist() == [1 / 2, 1 / 4]
    assert mrr(scores, labels, k=2, reduction="none").tolist() == [1 / 2, 0]
    assert mrr(scores, labels, relevant_at=2, reduction="none").tolist() == [1 / 4, 1 / 4]
    assert average_precision(scores, labels, reduction="none").tolist() == [(1 / 2 + 2 / 4) / 2, 1 / 4]
    assert average_precision(scores, labels, k=3, reduction="none").tolist() == [1 / 4, 0]
    assert average_precision(scores, labels, reduction="sum").item() == 3 / 4


def test_average_precision_is_sklearns():
    rng = np.random.default_rng(2)
    scores, labels = rng.normal(size=(8, 13)), rng.integers(0, 2, (8, 13))
    labels[:, 0] = 1
    ours = average_precision(torch.tensor(scores), torch.tensor(labels), reduction="none")
    assert ours.tolist() == pytest.approx([average_precision_score(y, s) for y, s in zip(labels, scores, strict=True)])
    assert ours.mean().item() == pytest.approx(label_ranking_average_precision_score(labels, scores))


def test_opa_is_roc_auc():
    rng = np.random.default_rng(3)
    scores, labels = rng.integers(0, 4, (8, 13)).astype(float), rng.integers(0, 2, (8, 13))
    labels[:, 0], labels[:, 1] = 0, 1
    ours = opa(torch.tensor(scores), torch.tensor(labels), ties="half", reduction="none")
    assert ours.tolist() == pytest.approx([roc_auc_score(y, s) for y, s in zip(labels, scores, strict=True)])


values = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6, width=32))


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(0, 40))
def test_pair_counts_are_brute_force(data, n):
    scores = torch.tensor(data.draw(hnp.arrays(np.float64, n, elements=values)))
    labels = torch.tensor(data.draw(hnp.arrays(np.float64, n, elements=values)))
    counts = pair_counts(scores[None], labels[None])
    assert [count.item() for count in counts] == brute_counts(scores, labels)


def test_pair_counts_of_many_queries():
    for seed in range(5):
        scores, labels, mask = lists(seed)
        counts = torch.stack(pair_counts(scores, labels, mask=mask), 1).tolist()
        for q, count in enumerate(counts):
            kept = mask[q] & ~labels[q].isnan()
            assert count == brute_counts(scores[q][kept], labels[q][kept])


def test_pnr_rules():
    scores = torch.tensor([[3.0, 1.0, 1.0, 2.0], [1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    labels = torch.tensor([[2, 1, 0, 0], [3, 2, 1, 0], [1, 0, NAN, NAN], [1, 1, 1, 1]])
    ratio, counts = pnr(scores, labels, return_counts=True)
    # C, D, E: (3, 1, 1), (0, 6, 0), (1, 0, 0), no pair
    assert [count.tolist() for count in counts] == [[3, 0, 1, 0], [1, 6, 0, 0], [1, 0, 0, 0]]
    assert ratio.item() == 4 / 7
    assert pnr(scores, labels, ties="negative").item() == 4 / 8
    assert pnr(scores, labels, ties="half").item() == 4.5 / 7.5
    none = pnr(scores, labels, average="none").tolist()
    assert none[:3] == [3, 0, math.inf] and math.isnan(none[3])
    assert pnr(scores, labels, average="macro").item() == math.inf
    assert pnr(scores, labels, average="macro", zero_division=NAN).item() == (3 + 0) / 2
    assert pnr(scores, labels, average="macro", zero_division=6).item() == (3 + 0 + 6) / 3
    assert math.isnan(pnr(scores[3:], labels[3:]).item())


def test_pnr_and_opa_agree_without_ties():
    rng = torch.Generator().manual_seed(4)
    scores, labels = torch.randn(1, 50, generator=rng), torch.randint(0, 4, (1, 50), generator=rng)
    share = opa(scores, labels)
    torch.testing.assert_close(pnr(scores, labels), share / (1 - share))


def test_opa_ties():
    scores, labels = torch.tensor([[3.0, 1.0, 2.0, 1.0]]), torch.tensor([[2, 1, 0, 0]])
    assert [opa(scores, labels, ties=t).item() for t in ("negative", "half", "exclude")] == [3 / 5, 3.5 / 5, 3 / 4]


@every_metric
def test_packed_is_padded(metric):
    scores, labels, mask = lists()
    flat_scores, flat_labels, cu_seqlens = packed(scores, labels, mask)
    a = metric(scores, labels, mask=mask, reduction="none")
    b = metric(flat_scores, flat_labels, cu_seqlens=cu_seqlens, reduction="none")
    assert a.shape == (12,) and torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
    # Documents past the last query belong to none.
    longer = torch.cat([flat_scores, flat_scores[:3]]), torch.cat([flat_labels, flat_labels[:3]])
    assert torch.equal(metric(*longer, cu_seqlens=cu_seqlens.long()), metric(scores, labels, mask=mask))


@every_metric
def test_padding_changes_nothing(metric):
    scores, labels, mask = lists()
    wider = [torch.nn.functional.pad(x, (0, 7), value=v) for x, v in ((scores, NAN), (labels, 1e30), (mask, False))]
    assert torch.equal(metric(scores, labels, mask=mask), metric(*wider[:2], mask=wider[2]))


@every_metric
def test_unlabelled_documents_are_left_out(metric):
    scores, labels = torch.tensor([[3.0, NAN, 2.0, 1.0]]), torch.tensor([[0, NAN, 2, 1]])
    keep = [0, 2, 3]
    assert torch.equal(metric(scores, labels), metric(scores[:, keep], labels[:, keep]))


@every_metric
def test_a_query_is_on_its_own(metric):
    scores, labels, mask = lists()
    together = metric(scores, labels, mask=mask, reduction="none")
    each = [slice(q, q + 1) for q in range(12)]
    alone = torch.cat([metric(scores[q], labels[q], mask=mask[q], reduction="none") for q in each])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-15, equal_nan=True)


@every_metric
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(metric, dtype):
    scores, labels, mask = lists()  # halves: exact in every dtype
    value = metric(scores.to(dtype), labels.to(dtype), mask=mask)
    assert value.dtype is torch.float64 and torch.equal(value, metric(scores, labels, mask=mask))
    whole = labels.nan_to_num(0)
    assert torch.equal(metric(scores, whole.long(), mask=mask), metric(scores, whole, mask=mask))


@every_metric
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
def test_nothing_to_measure(metric, shape):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metric(torch.zeros(shape), torch.zeros(shape)).isnan()
        assert metric(torch.zeros(shape), torch.zeros(shape), reduction="none").shape == shape[:1]
    assert metric(torch.zeros(0), torch.zeros(0), cu_seqlens=torch.tensor([0, 0, 0]), reduction="none").shape == (2,)


@every_metric
def test_gradient_is_not_tracked(metric):
    scores, labels, mask = lists()
    assert not metric(scores.requires_grad_(), labels, mask=mask).requires_grad


@pytest.mark.parametrize("metric", RANKED.values(), ids=RANKED.keys())
def test_queries_without_a_relevant_document(metric):
    scores = torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
    labels = torch.tensor([[1, 0], [0, 0], [NAN, NAN]])
    for empty, value in (("zero", 0), ("one", 1), ("skip", NAN)):
        none = metric(scores, labels, empty=empty, reduction="none")
        torch.testing.assert_close(none, torch.tensor([1, value, NAN], dtype=torch.float64), equal_nan=True)
        assert metric(scores, labels, empty=empty).item() == (1 if empty == "skip" else (1 + value) / 2)
    assert metric(torch.zeros(1, 1), torch.ones(1, 1)).item() == 1
    assert metric(scores, labels, reduction="sum").item() == 1


def test_infinite_scores_rank_first_and_last():
    scores, labels = torch.tensor([[-math.inf, 0.0, math.inf]]), torch.tensor([[0, 1, 2]])
    assert ndcg(scores, labels).item() == mrr(scores, labels).item() == opa(scores, labels).item() == 1


@every_metric
def test_long_list_is_fast(metric, one_thread):
    rng = torch.Generator().manual_seed(5)
    scores, labels = torch.randn(1, 200_000, generator=rng), torch.randn(1, 200_000, generator=rng).abs()
    start = time.perf_counter()
    value = metric(scores, labels)
    assert time.perf_counter() - start < 3  # some 0.2 s; n² would take minutes
    assert value.isfinite()


@every_metric
def test_bad_tensors(metric):
    scores, labels, _ = lists()
    with pytest.raises(ValueError, match=r"labels: expected \(Q, N\) = \(12, 9\) like scores, got \(12, 8\)"):
        metric(scores, labels[:, :8])
    with pytest.raises(TypeError, match="scores: expected a floating dtype"):
        metric(scores.long(), labels)
    with pytest.raises(TypeError, match="scores: expected a torch.Tensor, got list"):
        metric([1.0], labels)
    with pytest.raises(TypeError, match="labels: expected a torch.Tensor, got NoneType"):
        metric(scores, None)
    with pytest.raises(ValueError, match="scores: expected numbers, got NaN"):
        metric(torch.tensor([[NAN, 1.0]]), torch.ones(1, 2))
    with pytest.raises(ValueError, match="labels: expected finite"):
        metric(torch.ones(1, 2), torch.tensor([[math.inf, 1.0]]))
    with pytest.raises(ValueError, match="cu_seqlens: expected non-decreasing"):
        metric(torch.zeros(3), torch.zeros(3), cu_seqlens=torch.tensor([0, 2, 1]))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda s, y: ndcg(s, y, k=0), ValueError, "k: expected an int >= 1"),
        (lambda s, y: mrr(s, y, k=1.5), TypeError, "k: expected an int"),
        (lambda s, y: ndcg(s, y, gain="exp"), ValueError, "gain: expected one of 'exponential', 'linear', got 'exp'"),
        (lambda s, y: ndcg(s, y, ties="random"), ValueError, "ties: expected"),
        (lambda s, y: ndcg(s, y, retrieved=y), ValueError, "retrieved: expected torch.bool"),
        (lambda s, y: mrr(s, y, retrieved=y[:, 1:] > 0), ValueError, r"retrieved: expected torch.bool \(1, 3\) like labels"),
        (lambda s, y: average_precision(s, y, retrieved=True), TypeError, "retrieved: expected a torch.Tensor, got bool"),
        (lambda s, y: mrr(s, y, empty="nan"), ValueError, "empty: expected"),
        (lambda s, y: average_precision(s, y, reduction="median"), ValueError, "reduction: expected"),
        (lambda s, y: pnr(s, y, average="weighted"), ValueError, "average: expected"),
        (lambda s, y: pnr(s, y, zero_division="inf"), TypeError, "zero_division: expected a number, got str"),
        (lambda s, y: opa(s, y, ties="stable"), ValueError, "ties: expected"),
    ],
)
def test_bad_options(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.ones(1, 3), torch.tensor([[0.0, 1.0, 2.0]]))
