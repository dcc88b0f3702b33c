"""Means, intervals and tests of several systems, against scipy and by hand."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from pile_fast.evaluation import compare
from pile_fast.evaluation.compare import BOOTSTRAP_SAMPLES, PERMUTATIONS, Metric, evaluate, holm
from pile_fast.evaluation.metrics import average_precision, mrr, ndcg, opa, pair_counts, pnr

pytestmark = pytest.mark.usefixtures("one_thread")

NAN = math.nan
ALL = ("ndcg@3", "ndcg", "mrr", "mrr@2", "map", "map@4", "pnr", "opa")


@pytest.fixture
def lists():
    """Three systems, one of them with gaps; unlabelled documents; queries without a label, a relevant document or a pair."""
    rng = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 12, (60,), generator=rng)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    size = int(cu_seqlens[-1])
    labels = torch.randint(0, 3, (size,), generator=rng).double()
    labels[torch.rand(size, generator=rng) < 0.1] = NAN
    labels[: cu_seqlens[2]] = NAN
    labels[cu_seqlens[3] : cu_seqlens[5]] = 0
    good = labels.nan_to_num() + torch.randn(size, generator=rng).double()
    other = labels.nan_to_num() + 2 * torch.randn(size, generator=rng).double()
    gaps = torch.where(torch.rand(size, generator=rng) < 0.3, NAN, good.round())
    return {"good": good, "other": other, "gaps": gaps}, labels, cu_seqlens


@pytest.mark.parametrize("gain", ["linear", "exponential"])
@pytest.mark.parametrize("unjudged", ["zero", "skip"])
def test_values_are_the_metrics(lists, gain, unjudged):
    systems, labels, cu_seqlens = lists
    results = evaluate(systems, labels, cu_seqlens, metrics=ALL, gain=gain, unjudged=unjudged, empty="skip").results
    layout = {"cu_seqlens": cu_seqlens}
    query = torch.arange(60).repeat_interleave(cu_seqlens.diff())
    judged = torch.zeros(60).index_add_(0, query, (~labels.isnan()).float()) > 0
    ranked = labels if unjudged == "skip" else torch.where(labels.isnan() & judged[query], 0.0, labels)
    for name, scores in systems.items():
        options = {"empty": "skip", "retrieved": ~scores.isnan(), **layout}
        last = scores.nan_to_num(nan=-math.inf)
        wanted = {
            "ndcg@3": ndcg(scores, ranked, k=3, gain=gain, **options),
            "ndcg": ndcg(scores, ranked, gain=gain, **options),
            "mrr": mrr(scores, ranked, **options),
            "mrr@2": mrr(scores, ranked, k=2, **options),
            "map": average_precision(scores, ranked, **options),
            "map@4": average_precision(scores, ranked, k=4, **options),
            "pnr": pnr(last, labels, ties="half", **layout),
            "opa": opa(last, labels, **layout),
        }
        assert {metric: result.value for metric, result in results[name].items()} == {
            metric: pytest.approx(value.item()) for metric, value in wanted.items()
        }
        ratios = pnr(last, labels, average="none", ties="half", **layout)
        np.testing.assert_allclose(results[name]["pnr"].per_query, ratios)
        np.testing.assert_allclose(
            results[name]["map"].per_query, average_precision(scores, ranked, reduction="none", **options)
        )


def test_queries_are_counted_by_what_they_can_tell(lists):
    systems, labels, cu_seqlens = lists
    evaluation = evaluate(systems, labels, cu_seqlens, metrics=ALL, empty="skip")
    rows = [labels[a:b] for a, b in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)]
    known = [row[~row.isnan()] for row in rows]
    counts = evaluation.queries
    assert counts.total == 60 and counts.labelled == sum(len(row) > 0 for row in known) < 60
    assert counts.relevant == sum(bool((row >= 1).any()) for row in known) < counts.labelled
    assert counts.paired == sum(len(row.unique()) > 1 for row in known) < counts.labelled
    assert counts.documents == sum(map(len, known))
    for name in systems:
        queries = {metric: result.queries for metric, result in evaluation.results[name].items()}
        assert queries["map"] == queries["ndcg@3"] == queries["mrr"] == counts.relevant
        assert queries["pnr"] == queries["opa"] == counts.paired


@pytest.mark.parametrize("empty, value", [("zero", 0.0), ("one", 1.0)])
def test_queries_without_a_relevant_document_can_be_counted(lists, empty, value):
    systems, labels, cu_seqlens = lists
    result = evaluate(systems, labels, cu_seqlens, metrics=["ndcg@3"], empty=empty).results["good"]["ndcg@3"]
    skipped = evaluate(systems, labels, cu_seqlens, metrics=["ndcg@3"], empty="skip").results["good"]["ndcg@3"]
    added = result.queries - skipped.queries
    assert added > 0
    assert result.value == pytest.approx((skipped.value * skipped.queries + value * added) / result.queries)


def test_what_a_system_did_not_return_earns_nothing_and_is_counted(lists):
    systems, labels, cu_seqlens = lists
    evaluation = evaluate(systems, labels, cu_seqlens, metrics=["mrr"])
    coverage, known = evaluation.coverage, ~labels.isnan()
    bounds = list(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True))
    assert coverage["good"].documents == int(known.sum()) and coverage["good"].tied_share == 0
    assert coverage["good"].unjudged == sum(int((~known[a:b]).sum()) for a, b in bounds if known[a:b].any()) > 0
    returned = ~systems["gaps"].isnan()
    assert coverage["gaps"].documents == int((known & returned).sum()) < int(known.sum())
    assert coverage["gaps"].queries == sum(bool(returned[a:b].any() and known[a:b].any()) for a, b in bounds)
    last = systems["gaps"].nan_to_num(nan=-1e9)
    right, wrong, tied = (count.sum().item() for count in pair_counts(last, labels, cu_seqlens=cu_seqlens))
    counts = coverage["gaps"]
    assert (counts.right_pairs, counts.wrong_pairs, counts.tied_pairs) == (right, wrong, tied)
    assert counts.tied_share == tied / (right + wrong + tied) > 0


def test_a_query_that_a_system_lacks_is_worth_nothing():  # C1
    """Not even where the relevant document happens to come first in the tensors."""
    labels, cu_seqlens = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0, 2, 4])
    lacks = torch.tensor([2.0, 1.0, NAN, NAN])
    results = evaluate({"lacks": lacks, "all": torch.ones(4)}, labels, cu_seqlens, metrics=["ndcg", "mrr", "map"]).results
    for metric in ("ndcg", "mrr", "map"):
        assert results["lacks"][metric].per_query.tolist() == [1, 0] and results["lacks"][metric].value == 0.5
        assert results["all"][metric].per_query.tolist() == [1, 1]


def test_what_nobody_judged_is_never_relevant():
    labels, cu_seqlens = torch.tensor([NAN, 0.0, 1.0]), torch.tensor([0, 3])
    scores = {"a": torch.tensor([3.0, 2.0, 1.0])}
    for relevant_at, wanted in ((1, 1 / 3), (0, 1 / 2), (-1, 1 / 2)):
        assert (
            evaluate(scores, labels, cu_seqlens, metrics=["mrr"], relevant_at=relevant_at).results["a"]["mrr"].value == wanted
        )
    left_out = evaluate(scores, labels, cu_seqlens, metrics=["mrr"], unjudged="skip").results["a"]["mrr"]
    assert left_out.value == 1 / 2


@pytest.mark.parametrize("largest", [300, 1024, 10**6])
def test_large_and_negative_labels(largest):  # B2
    labels, cu_seqlens = torch.tensor([-2, largest, largest - 1]), torch.tensor([0, 3])
    systems = {"best": torch.tensor([1.0, 3.0, 2.0]), "worst": torch.tensor([3.0, 1.0, 2.0])}
    for gain in ("linear", "exponential"):
        results = evaluate(systems, labels, cu_seqlens, metrics=ALL, gain=gain, baseline="worst").results
        assert results["best"]["ndcg"].value == 1 and 0.3 < results["worst"]["ndcg"].value < 0.9


def test_a_million_queries_are_resampled_in_blocks(monkeypatch):  # B14
    """Their interval and p are those of the single queries, but for chance."""
    rng = torch.Generator().manual_seed(0)
    queries = 3000
    labels, cu_seqlens = torch.tensor([1.0, 0.0, 0.0]).repeat(queries), torch.arange(0, 3 * queries + 1, 3)
    systems = {name: labels + noise * torch.randn(3 * queries, generator=rng) for name, noise in (("a", 1.0), ("b", 1.03))}
    arguments = {"metrics": ["mrr", "pnr"], "baseline": "a"}
    single = evaluate(systems, labels, cu_seqlens, **arguments).results["b"]
    monkeypatch.setattr(compare, "MOST_UNITS", 700)
    blocks = evaluate(systems, labels, cu_seqlens, **arguments).results["b"]
    for metric in ("mrr", "pnr"):
        one, other = single[metric], blocks[metric]
        assert one.value == other.value and other.queries == queries
        width = one.high - one.low
        assert (other.low, other.high) == pytest.approx((one.low, one.high), abs=0.12 * width)
        assert other.p == pytest.approx(one.p, abs=0.1) and 0.01 < one.p < 0.9


def test_interval_is_scipys_percentile_bootstrap(lists):
    systems, labels, cu_seqlens = lists
    results = evaluate(systems, labels, cu_seqlens, metrics=["map", "pnr"]).results["other"]
    values = results["map"].per_query
    values = values[~np.isnan(values)]
    options = {"method": "percentile", "n_resamples": 20_000, "rng": 0}
    interval = scipy.stats.bootstrap((values,), np.mean, **options).confidence_interval
    width = interval.high - interval.low
    assert results["map"].low == pytest.approx(interval.low, abs=0.06 * width)
    assert results["map"].high == pytest.approx(interval.high, abs=0.06 * width)
    right, wrong, _ = (count.numpy() for count in pair_counts(systems["other"], labels, cu_seqlens=cu_seqlens))
    interval = scipy.stats.bootstrap(
        (right, wrong), lambda c, d, axis: c.sum(axis) / d.sum(axis), paired=True, **options
    ).confidence_interval
    width = interval.high - interval.low
    assert results["pnr"].low == pytest.approx(interval.low, abs=0.06 * width)
    assert results["pnr"].high == pytest.approx(interval.high, abs=0.06 * width)


def test_p_is_scipys_paired_permutation_test(lists):
    systems, labels, cu_seqlens = lists
    results = evaluate(systems, labels, cu_seqlens, metrics=["ndcg@3", "opa"], baseline="good").results
    for metric in ("ndcg@3", "opa"):
        ours, base = results["other"][metric], results["good"][metric]
        pairs = np.stack([ours.per_query, base.per_query])
        pairs = pairs[:, ~np.isnan(pairs[0])]
        test = scipy.stats.permutation_test(
            tuple(pairs), lambda a, b, axis: (a - b).mean(axis), permutation_type="samples", n_resamples=20_000, rng=0
        )
        assert ours.p == pytest.approx(test.pvalue, abs=0.015)
        assert ours.difference == pytest.approx(test.statistic)
        assert ours.difference_low < ours.difference < ours.difference_high
        # The interval and the test tell one story, but for cases at the edge, which these are not.
        assert (ours.p < 0.05) == (not ours.difference_low < 0 < ours.difference_high)


def test_few_queries_are_tested_exactly_but_for_sampling():
    """Five queries, all won: 2 of the 32 exchanges are as extreme."""
    labels, cu_seqlens = torch.tensor([1.0, 0.0] * 5), torch.arange(0, 11, 2)
    better, worse = torch.tensor([1.0, 0.0] * 5), torch.tensor([0.0, 1.0] * 5)
    results = evaluate({"better": better, "worse": worse}, labels, cu_seqlens, metrics=["mrr", "pnr"], baseline="worse").results
    for metric in ("mrr", "pnr"):
        assert results["better"][metric].p == pytest.approx(2 / 32, abs=0.008)
    assert results["better"]["mrr"].difference == 0.5
    assert results["better"]["pnr"].value == math.inf and results["worse"]["pnr"].value == 0
    assert results["better"]["pnr"].difference == math.inf


def test_equal_systems_differ_by_nothing(lists):
    systems, labels, cu_seqlens = lists
    results = evaluate({"a": systems["good"], "b": systems["good"] * 2}, labels, cu_seqlens, metrics=ALL, baseline="a").results
    for result in results["b"].values():
        assert (result.difference, result.difference_low, result.difference_high, result.p, result.p_holm) == (0, 0, 0, 1, 1)
    assert all(result.p is None for result in results["a"].values())


def test_under_the_null_hypothesis_p_is_uniform(monkeypatch):
    """Systems of equal quality: p < 0.2 in about a fifth of the trials."""
    monkeypatch.setattr(compare, "PERMUTATIONS", 300)
    monkeypatch.setattr(compare, "BOOTSTRAP_SAMPLES", 1)
    rng = torch.Generator().manual_seed(0)
    queries, n = 40, 6
    cu_seqlens = torch.arange(0, queries * n + 1, n)
    below = 0
    for _ in range(60):
        labels = torch.randint(0, 2, (queries * n,), generator=rng).double()
        systems = {name: labels + torch.randn(queries * n, generator=rng) for name in "ab"}
        below += evaluate(systems, labels, cu_seqlens, metrics=["map"], baseline="a").results["b"]["map"].p < 0.2
    assert 4 <= below <= 21  # 12 expected; outside with probability 0.2 %


def test_the_same_seed_gives_the_same_numbers_whoever_else_is_there(lists):
    systems, labels, cu_seqlens = lists
    alone = evaluate({"good": systems["good"]}, labels, cu_seqlens, metrics=["map"]).results["good"]["map"]
    together = evaluate(systems, labels, cu_seqlens, metrics=["ndcg", "map"]).results["good"]["map"]
    assert (alone.value, alone.low, alone.high) == pytest.approx((together.value, together.low, together.high), abs=1e-12)
    other = evaluate({"good": systems["good"]}, labels, cu_seqlens, metrics=["map"], seed=1).results["good"]["map"]
    assert other.value == alone.value and other.low != alone.low


def test_chunks_of_resampling_make_no_difference_to_what_is_tested(lists, monkeypatch):
    systems, labels, cu_seqlens = lists
    monkeypatch.setattr(compare, "_CHUNK", 50 * 999)
    assert sum(compare._chunks(PERMUTATIONS, 50)) == PERMUTATIONS
    assert sum(compare._chunks(BOOTSTRAP_SAMPLES, 10**9)) == BOOTSTRAP_SAMPLES
    result = evaluate(systems, labels, cu_seqlens, metrics=["map"], baseline="good").results["other"]["map"]
    monkeypatch.undo()
    whole = evaluate(systems, labels, cu_seqlens, metrics=["map"], baseline="good").results["other"]["map"]
    assert result.p == pytest.approx(whole.p, abs=0.02) and result.low == pytest.approx(whole.low, abs=0.02)


def test_nothing_to_evaluate_gives_no_values_and_no_error():
    labels, cu_seqlens = torch.full((4,), NAN), torch.tensor([0, 2, 4])
    evaluation = evaluate({"a": torch.ones(4), "b": torch.ones(4)}, labels, cu_seqlens, metrics=ALL, baseline="a")
    for result in evaluation.results["b"].values():
        assert result.queries == 0 and math.isnan(result.value) and math.isnan(result.low) and math.isnan(result.p)
    assert evaluation.queries.labelled == 0 and math.isnan(evaluation.coverage["a"].tied_share)


def test_holm_by_hand():
    assert holm(np.array([0.01, 0.04, 0.03, NAN])).tolist()[:3] == pytest.approx([0.03, 0.06, 0.06])
    assert np.isnan(holm(np.array([0.01, NAN]))[1])
    assert holm(np.array([0.6, 0.5])).tolist() == [1, 1]
    assert holm(np.array([])).tolist() == []


@pytest.mark.parametrize(
    "name", ["recall", "p", "err", "ndcg@0", "ndcg@", "ndcg@ten", "ndcg@²", "pnr@5", "opa@3", "rbp@5", "", "dcg", "p@-1"]
)
def test_unknown_metrics_are_refused(name):
    with pytest.raises(ValueError, match="metrics: expected ndcg, mrr or map"):
        Metric(name)


def test_metrics_have_one_name():
    names = ["nDCG@010", "AP", "RR@10", "R@5", "Recall@5", "P@5", "RBP", "ERR@20"]
    assert [Metric(name).name for name in names] == ["ndcg@10", "map", "mrr@10", "recall@5", "recall@5", "p@5", "rbp", "err@20"]


def test_unknown_baseline_is_refused(lists):
    with pytest.raises(ValueError, match="baseline: expected one of good, other, gaps, got 'best'"):
        evaluate(*lists, baseline="best")


@pytest.mark.parametrize("option", ["gain", "unjudged", "empty"])
def test_unknown_options_are_refused(lists, option):
    with pytest.raises(ValueError, match=f"{option}: expected one of .* got 'best'"):
        evaluate(*lists, **{option: "best"})
