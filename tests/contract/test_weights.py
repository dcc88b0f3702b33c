"""Weights of documents and of queries, in every loss."""

import pytest
import torch
from contract.problems import NAN, batch, check_loss, make, run, same

from pile_fast import ranking_loss, terms


def of(loss, how, z, t, y, **options):
    return run(loss.call, z, t, y, **how, **options)


def test_ones_change_nothing(loss, how):
    z, t, y = batch()
    for ones in (dict(weights=torch.ones(3, 21)), dict(query_weights=torch.ones(3)), dict(weights=torch.ones(3, 21).double())):
        for got, want in zip(of(loss, how, z, t, y, **ones), of(loss, how, z, t, y), strict=True):
            same(got, want)


@pytest.mark.parametrize("packed", [False, True])
def test_a_document_of_weight_zero_is_not_there(loss, how, packed):
    z, t, y, where = make(21, 3, masked=0.2, packed=packed)
    weights = torch.rand(z.shape) + 0.5
    gone = torch.rand(z.shape) < 0.3
    if not packed:
        gone[2] = True  # a whole query
    weights[gone] = 0
    z[gone] = NAN  # not even this shows
    value, gradient = of(loss, how, z, t, y, weights=weights, **where)
    if packed:
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), (~gone).cumsum(0)])
        without = dict(cu_seqlens=ends[where["cu_seqlens"]])
        parts = [x[~gone] for x in (z, t, y, weights)]
    else:
        without, parts = dict(mask=where["mask"] & ~gone), [z, t, y, weights]
    if loss.term is None:  # the ensemble sees documents of weight 0
        return
    want, want_gradient = of(loss, how, *parts[:3], weights=parts[3], **without)
    same(value, want)
    same(gradient[~gone], want_gradient if packed else want_gradient[~gone])
    assert (gradient[gone] == 0).all()


def test_query_weights_multiply(loss, how):
    z, t, y = batch(4)
    c = torch.tensor([0.5, 3.0, 0.0, 1.0])
    value, gradient = of(loss, how, z, t, y, reduction="none", query_weights=c)
    plain, plain_gradient = of(loss, how, z, t, y, reduction="none")
    same(value, c * plain)
    same(gradient, c[:, None] * plain_gradient)
    value, gradient = of(loss, how, z, t, y, query_weights=c)
    same(value, (c * plain).sum() / 3)  # a query of weight 0 is not there


def test_a_query_of_weight_zero_hides_what_is_in_it(loss, how):
    z, t, y = batch(2)
    z[1, 3] = NAN
    value, gradient = of(loss, how, z, t, y, query_weights=torch.tensor([1.0, 0.0]))
    assert value.isfinite() and (gradient[1] == 0).all()


@pytest.mark.axes(
    queries=[2, 3],
    teachers=[2],
    spread=[0.1, 1.0, 5.0, 20.0, 100.0],
    labels=["grades", "continuous"],
    missing=[0.0, 0.4],
    unlabelled=[0.0, 0.3],
    masked=[0.0, 0.3],
    packed=[False, True],
    dtype=[torch.float32, torch.float64, torch.bfloat16],
    seed=range(1000),
    alpha=[0.0, 0.5, 1.0],
    distillation=terms.defaults("distill"),
    label_loss=[*terms.defaults("label"), terms.LambdaRank(cutoff=4)],
    pair_weight=[None, "gain_gap"],
    reduction=["mean", "none"],
)
def test_against_the_reference(how, target, sample):
    from pile_fast import pile_loss

    sample = dict(sample)
    data = "n queries teachers spread labels missing unlabelled masked packed dtype seed".split()
    z, t, y, where = make(**{name: sample.pop(name) for name in data})
    weights = torch.rand(z.shape) * 3
    weights[torch.rand(z.shape) < 0.2] = 0
    queries = sample_weights(where, z)
    options = dict(iterations=0, weights=weights, query_weights=queries)
    check_loss(pile_loss, z, t, y, how, **where, **options, **sample)


def sample_weights(where, z):
    return torch.rand(len(where["cu_seqlens"]) - 1 if "cu_seqlens" in where else z.shape[0]) + 0.1


def test_a_pair_counts_by_its_preferred_document(how):
    z, y = torch.zeros(1, 3), torch.tensor([[2, 1, 0]])
    value = ranking_loss(z, y, weights=torch.tensor([[4.0, 2.0, 7.0]]), **how)
    assert abs(value.item() - (4 + 4 + 2) / 3 * 0.693147) < 1e-5


def test_wrong_weights(how):
    z, _, y = batch()
    for wrong, words in ((-1.0, "-1.0 at \\[1, 2\\]"), (NAN, "nan at"), (float("inf"), "inf at")):
        weights = torch.ones(3, 21)
        weights[1, 2] = wrong
        if z.device.type == "cpu":
            with pytest.raises(ValueError, match=f"weights: expected finite weights >= 0, got {words}"):
                ranking_loss(z, y, weights=weights, **how)
        else:
            assert ranking_loss(z, y, weights=weights, reduction="none", **how).isnan().tolist() == [False, True, False]
        mask = torch.ones(3, 21, dtype=torch.bool)
        mask[1, 2] = False
        assert ranking_loss(z, y, weights=weights, mask=mask, **how).isfinite()  # nobody looks under the mask
    with pytest.raises(ValueError, match=r"weights: expected \(Q, N\) = \(3, 21\)"):
        ranking_loss(z, y, weights=torch.ones(3, 20), **how)
    with pytest.raises(ValueError, match=r"query_weights: expected \(Q,\) = \(3,\), got \(4,\)"):
        ranking_loss(z, y, query_weights=torch.ones(4), **how)
    with pytest.raises(TypeError, match="weights: expected a floating dtype"):
        ranking_loss(z, y, weights=torch.ones(3, 21, dtype=torch.int64), **how)
