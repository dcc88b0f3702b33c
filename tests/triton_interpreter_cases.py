"""What only the Triton kernels are asked, in Triton's interpreter: the ways they cut lists, and the rules that choose them.

test_triton.py runs this file with tests/contract, in a process of its own with TRITON_INTERPRET=1: the switch is read when
triton is imported.
"""

import pytest
import torch
from contract.problems import NAN, check_loss, close, covering, largest, make, run, scale_of
from contract.targets import TRITON_INTERPRETER, a_launch_per_phase, short_blocks

import pile_fast
from pile_fast.backends import torch_reference, triton_long
from pile_fast.backends import triton as backend
from pile_fast.batch import RankingBatch
from pile_fast.options import ensemble_options, loss_options

pytestmark = pytest.mark.usefixtures("poisoned")
DIRECT, LINEAR = (dict(backend="triton", pairwise=pairwise) for pairwise in ("direct", "chebyshev"))


def test_packed_lists_long_and_short_in_linear_time(monkeypatch):
    # More than 128 chunks, so their sums have two levels; a long list among short and empty ones; documents of no query.
    monkeypatch.setattr(triton_long, "WINDOW", 4)
    z, t, y, _ = make(150, 1, 2, missing=0.2, unlabelled=0.1)
    cu_seqlens = torch.tensor([0, 3, 3, 131, 132, 147], dtype=torch.int32)
    options = dict(cu_seqlens=cu_seqlens, iterations=1, alpha=0.5, reduction="none")
    check_loss(pile_fast.pile_loss, z[0], t[0], y[0], LINEAR, **options)


def test_well_ordered_lists_keep_their_digits(monkeypatch):
    """Two grades, all pairs right by 12 and more: losses and gradients of e^-12 and less."""
    short_blocks(monkeypatch)
    y = torch.arange(120)[None] % 2
    z = y * 14.0 + torch.rand(1, 120)
    rank = lambda z, t, y, **kw: pile_fast.ranking_loss(z, y, **kw)  # noqa: E731
    got, gradient = run(rank, z, z, y, **LINEAR)
    want, want_gradient = run(rank, z.double(), z, y, backend="torch")
    assert abs(got - want) <= 1e-5 * want
    assert largest(gradient - want_gradient) <= 1e-5 * largest(want_gradient)


@pytest.mark.parametrize("n, queries, packed, linear", [
    (128, 4096, False, False), (512, 1024, False, True), (1000, 16, False, False), (100_000, 1, False, True),
    (4096, 64, True, False), (100_000, 1000, True, True), (8191, 1, True, False),
])  # fmt: skip
def test_auto_goes_by_shapes(n, queries, packed, linear):
    shape = (n,) if packed else (queries, n)
    student = torch.empty(shape, device="meta")
    cu_seqlens = torch.empty(queries + 1, dtype=torch.int32, device="meta") if packed else None
    assert backend._in_linear_time(pile_fast.batch.RankingBatch(student_logits=student, cu_seqlens=cu_seqlens)) == linear


def test_the_same_bits_every_time_in_several_launches(monkeypatch):
    a_launch_per_phase(monkeypatch)
    z, t, y, _ = make(40)
    first, again = (run(pile_fast.pile_loss, z, t, y, alpha=0.5, iterations=2, **DIRECT) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_more_than_128_teachers_are_refused():
    with pytest.raises(RuntimeError, match="backend 'triton' takes at most 128 teachers, got 129"):
        pile_fast.pile_ensemble(torch.zeros(1, 4, 129), torch.zeros(1, 4), backend="triton")


# -- what nobody can check on a device


@pytest.mark.parametrize("way", TRITON_INTERPRETER.numerics[:2], ids=lambda way: way.name)
@pytest.mark.parametrize("term", ["logistic", "softmax", "lambdarank", "approx_ndcg"])
def test_wrong_labels_and_weights_break_their_query_and_no_other(monkeypatch, way, term):
    way.prepare(monkeypatch)
    z, _, y, _ = make(20, 3)
    options = loss_options(alpha=0.0, label_loss=term, pairwise=way.pairwise, reduction="none")
    batch = RankingBatch(student_logits=z, labels=y, weights=torch.ones(3, 20), query_weights=torch.ones(3))
    want, want_gradient = backend.pair_loss(batch, options, True)
    broken = []
    for weight in (-1.0, NAN, float("inf")):
        batch.weights = torch.ones(3, 20)
        batch.weights[1, 2] = weight
        broken.append(backend.pair_loss(batch, options, True))
    batch.weights = torch.ones(3, 20)
    for weight in (-1.0, NAN):
        batch.query_weights = torch.tensor([1.0, weight, 1.0])
        broken.append(backend.pair_loss(batch, options, True))
    batch.query_weights = torch.ones(3)
    if options.label_loss.has_gains:
        batch.labels = y.clone()
        batch.labels[1, 3] = -1
        broken.append(backend.pair_loss(batch, options, True))
    for loss, gradient in broken:
        assert loss.isnan().tolist() == [False, True, False] and gradient[1].isnan().all()
        assert torch.equal(loss[[0, 2]], want[[0, 2]]) and torch.equal(gradient[[0, 2]], want_gradient[[0, 2]])


def test_weights_of_large_groups_in_linear_time(monkeypatch):
    """Two grades, so that groups are blocks of several chunks, and documents of weight 0 at their ends."""
    short_blocks(monkeypatch)
    z, t, y, _ = make(150, 2, 1, missing=0.1, unlabelled=0.3, spread=2.0)
    y = torch.where(y > 2, 2.0, torch.where(y == y, 0.0, NAN))
    weights = torch.rand(z.shape) * 3
    weights[torch.rand(z.shape) < 0.2] = 0
    options = dict(alpha=0.5, granularity="shared", iterations=0, reduction="none", weights=weights)
    for pair_weight in (None, "label_gap"):
        check_loss(pile_fast.pile_loss, z, t, y, LINEAR, pair_weight=pair_weight, prior=torch.ones(1), **options)


# -- weights that all queries share

TINY = torch.finfo(torch.float32).tiny
PRIORS = [None, [1.0, 2.0, 0.5], [3.0, TINY, 1.0], [0.0, 1.0, 1.0]]
POINTS = covering(
    dict(
        n=range(100), queries=[1, 2, 3], missing=[0.0, 0.4, 0.9], unlabelled=[0.0, 0.3, 1.0], masked=[0.0, 0.3],
        packed=[False, False, True], seed=range(1000), dtype=[torch.float32, torch.float32, torch.bfloat16, torch.float16],
        labels=["grades", "continuous"], prior=PRIORS, pair_weight=[None, "label_gap", "gain_gap"], margin=[0.0, 0.3],
        temperature=[0.5, 1.0, 0.1], normalize=["zscore", "center", "none", "minmax", "logit"], alpha=[0.0, 0.5, 1.0],
        reduction=["mean", "sum", "none"],
    ),
    8,
)  # fmt: skip


@pytest.mark.parametrize("way", TRITON_INTERPRETER.numerics, ids=lambda way: way.name)
@pytest.mark.parametrize("number", range(len(POINTS)))
def test_weights_and_pulls_of_queries(monkeypatch, way, number):
    """The ensemble by given weights, and each query's pull on them, alone and beside the loss."""
    way.prepare(monkeypatch)
    point = dict(POINTS[number])
    names = ("queries", "missing", "unlabelled", "masked", "packed", "seed", "dtype", "labels")
    z, t, y, where = make(way.lengths[point.pop("n") % len(way.lengths)], **{name: point.pop(name) for name in names})
    if point["normalize"] == "logit":
        t = t.sigmoid()
    prior = point.pop("prior")
    prior = None if prior is None else torch.tensor(prior, dtype=torch.float64)
    of_loss = {name: point.pop(name) for name in ("alpha", "reduction")}
    options = ensemble_options(granularity="shared", iterations=0, pairwise=way.pairwise, **point)
    loss = loss_options(**of_loss, pair_weight=point["pair_weight"], pairwise=way.pairwise)
    wide = point["normalize"] != "logit"  # whose clamp is by the dtype

    def call(module, z, t):
        batch = RankingBatch(student_logits=z, teacher_logits=t, labels=y, prior=prior, **where)
        logits, _, _ = module.ensemble(batch, options, False, False)
        pulls, losses = module.pulls(batch, options)
        return logits, pulls, losses, *module.pile_loss(batch, options, loss, True, True)

    own = call(torch_reference, z.float(), t.float())
    want = call(torch_reference, z.double(), t.double()) if wide else own
    got = call(backend, z, t)
    for name, a, b, c in zip(("logits", "pulls", "label losses", "loss", "gradient", "pulls too"), got, own, want, strict=True):
        assert a.shape == c.shape, name
        relative = max(1e-5, 2 * torch.finfo(z.dtype).eps) if name == "gradient" else 4e-6
        close(a, b, c, relative * max(largest(c), scale_of(t) if name == "logits" else 0.0) + 1e-7)


@pytest.mark.parametrize("way", TRITON_INTERPRETER.numerics, ids=lambda way: way.name)
def test_pulls_of_queries_without_documents(monkeypatch, way):
    way.prepare(monkeypatch)
    options, loss = ensemble_options(iterations=0, pairwise=way.pairwise), loss_options(pairwise=way.pairwise)
    for shape, cu_seqlens in (((0, 5), None), ((2, 0), None), ((4,), torch.tensor([0, 0, 4, 4]))):
        z, t = torch.randn(shape), torch.randn(*shape, 3)
        y = torch.zeros(shape) if cu_seqlens is None else torch.arange(4.0)
        batch = RankingBatch(student_logits=z, teacher_logits=t, labels=y, cu_seqlens=cu_seqlens)
        pulls, losses = backend.pulls(batch, options)
        _, _, beside = backend.pile_loss(batch, options, loss, False, True)
        assert pulls.shape == beside.shape == (batch.num_queries, 3) and losses.shape == (batch.num_queries,)
        there = torch.tensor([False, True, False]) if cu_seqlens is not None else torch.zeros(shape[0], dtype=torch.bool)
        for found in (pulls, beside, losses.unsqueeze(1)):
            assert (found.isnan() == ~there.unsqueeze(1)).all()


def test_a_teacher_of_the_smallest_weight_is_there():
    t = torch.tensor([[[1.0, 5.0], [0.0, NAN], [NAN, 2.0]]])
    prior = torch.tensor([1e30, 1e-30], dtype=torch.float64)  # a ratio that float32 does not have
    logits = pile_fast.pile_ensemble(t, torch.zeros(1, 3), iterations=0, normalize="none", prior=prior, **DIRECT).logits
    assert torch.equal(logits, torch.tensor([[1.0, 0.0, 2.0]]))


def test_the_fit_is_the_references():
    _, t, y, where = make(17, 3, missing=0.2, unlabelled=0.3)
    options = dict(iterations=3, return_weights=True, return_trace=True, **where)
    got = pile_fast.pile_ensemble(t, y, **options, **DIRECT)
    want = pile_fast.pile_ensemble(t.double(), y, **options, backend="torch")
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        close(a, a, b, 2e-6 * scale_of(t))
