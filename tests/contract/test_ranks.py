"""Losses that depend on ranks: ties by their expectation, gains of any size, and what no label may be."""

import itertools
import math

import pytest
import torch
from contract.problems import check_loss, make, run, same

from pile_fast import ranking_loss, terms

RANKED = [terms.LambdaRank(), terms.LambdaRank(cutoff=3), terms.LambdaRank(metric="mrr"), terms.ApproxNDCG(), terms.Softmax()]
pytestmark = pytest.mark.parametrize("term", RANKED, ids=str)


def skip_unless_there(how, term):
    from pile_fast.backends import load
    from pile_fast.batch import RankingBatch
    from pile_fast.options import loss_options

    z = torch.zeros(1, 2)
    if reason := load(how["backend"]).refusal(
        RankingBatch(student_logits=z, labels=z), None, loss_options(alpha=0, label_loss=term)
    ):
        pytest.skip(reason)


def by_definition(term, z, y):
    """LambdaRank of one list, pair by pair, with the ranks of `z` in a given order of ties."""
    order = sorted(range(len(z)), key=lambda i: -z[i])
    rank = {i: r for r, i in enumerate(order, 1)}
    discount = lambda r: (1 / r if term.metric == "mrr" else 1 / math.log2(1 + r)) if not term.cutoff or r <= term.cutoff else 0  # noqa: E731
    gain = [float(v > 0) if term.metric == "mrr" else 2**v - 1 if term.gain == "exp2" else v for v in y]
    most = sum(g * discount(r) for r, g in enumerate(sorted(gain, reverse=True), 1))
    return sum(
        (gain[i] - gain[j]) / most * abs(discount(rank[i]) - discount(rank[j])) * math.log1p(math.exp(z[j] - z[i]))
        for i in range(len(z))
        for j in range(len(z))
        if y[i] > y[j]
    )


def test_the_definition_and_the_mean_over_all_orders_of_ties(how, term):
    if not isinstance(term, terms.LambdaRank):
        pytest.skip("has no ranks to break ties of")
    skip_unless_there(how, term)
    y = [2.0, 0.0, 1.0, 0.0, 3.0, 1.0]
    for z in ([0.1, 0.7, -0.3, 0.2, 0.0, 1.5], [0.5, 0.5, -1.0, 0.5, 0.5, -1.0], [0.0] * 6):
        orders = list(itertools.permutations(range(6)))
        want = sum(by_definition(term, [z[i] for i in o], [y[i] for i in o]) for o in orders) / len(orders)
        got = ranking_loss(torch.tensor([z]), torch.tensor([y]), kind=term, **how)
        same(got, torch.tensor(want, dtype=got.dtype), rtol=1e-5)


@pytest.mark.parametrize("logits", ["equal", "few", "different"])
def test_the_order_of_rows_never_matters(how, term, logits, target):
    skip_unless_there(how, term)
    n = min(60, target.documents)
    z, _, y, _ = make(n, 2)
    z = {"equal": torch.zeros_like(z), "few": z.round(), "different": z}[logits]
    loss = lambda z, t, y, **kw: ranking_loss(z, y, kind=term, **kw)  # noqa: E731
    value, gradient = run(loss, z, None, y, **how)
    assert gradient.abs().max() > 1e-4  # equal logits learn, too
    for order in (y[0].argsort(descending=True), y[0].argsort(), torch.randperm(n)):
        other, other_gradient = run(loss, z[:, order], None, y[:, order], **how)
        same(other, value)
        same(other_gradient, gradient[:, order])


@pytest.mark.parametrize("largest", [1e-3, 30.0, 300.0, 2000.0])
def test_gains_of_labels_of_any_size(how, term, largest, target):
    skip_unless_there(how, term)
    z, t, y, _ = make(min(40, target.documents), 2, labels="continuous", unlabelled=0.2)
    y = y / 3 * largest
    if isinstance(term, terms.Softmax):
        term = terms.Softmax(gain="exp2")
    check_loss(lambda z, t, y, **kw: ranking_loss(z, y, kind=term, **kw), z, t, y, how)


def test_negative_labels_cannot_be_gains(how, term):
    skip_unless_there(how, term)
    z, y = torch.zeros(2, 3), torch.tensor([[0.0, 1.0, 2.0], [0.0, -1.0, 2.0]])
    if z.device.type == "cpu":
        with pytest.raises(ValueError, match=rf"labels: expected labels >= 0 for '{term.name}'.*got -1 at \[1, 1\]; NaN marks"):
            ranking_loss(z, y, kind=term, **how)
    else:
        assert ranking_loss(z, y, kind=term, reduction="none", **how).isnan().tolist() == [False, True]
    for hidden in (dict(mask=y >= 0), dict(weights=(y >= 0).float())):
        assert ranking_loss(z, y, kind=term, **hidden, **how).isfinite()
    packed = dict(cu_seqlens=torch.tensor([0, 3]))
    assert ranking_loss(z.flatten()[:5], y.flatten()[:5], kind=term, **packed, **how).isfinite()


def test_a_label_of_minus_zero_is_zero(how, term):
    z, y, weights = (
        torch.tensor([[0.3, -0.2, 0.9, 0.1]]),
        torch.tensor([[2.0, 0.0, 1.0, 0.0]]),
        torch.tensor([[0.3, 2.0, 0.5, 1.0]]),
    )
    loss = lambda z, t, y, **kw: ranking_loss(z, y, kind=term, **kw)  # noqa: E731
    for own in (dict(), dict(weights=weights)):
        for got, want in zip(
            run(loss, z, None, y.where(y > 0, -0.0), **own, **how), run(loss, z, None, y, **own, **how), strict=True
        ):
            same(got, want)
