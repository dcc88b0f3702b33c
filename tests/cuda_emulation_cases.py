"""What only an emulation of the CUDA kernels on the CPU (tests/cuda_emulation) can be asked, or only these kernels.

test_cuda.py builds the emulated module and runs this file with tests/contract, in a process of its own with
PILE_FAST_CUDA_EMULATION set.
"""

import itertools

import pytest
import torch
from contract.problems import NAN, check_ensemble, check_loss, losses, make, run, same

from pile_fast import pile_ensemble, pile_loss, terms
from pile_fast.backends import cuda as backend
from pile_fast.backends import torch_reference
from pile_fast.batch import RankingBatch
from pile_fast.functional import pile_loss_and_pulls
from pile_fast.options import ensemble_options, loss_options

module = backend._module()
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=["direct", "chebyshev"])
def how(request):
    return dict(backend="cuda", pairwise=request.param)


@pytest.fixture(autouse=True)
def forward_order():
    yield
    module.set_order("forward")


@pytest.mark.parametrize("teachers", [2, 4, 8, 16, 129])
def test_teachers_by_vector_loads_and_one_by_one(how, teachers):
    for dtype in (torch.float32, torch.bfloat16):
        _, t, y, _ = make(9, 2, teachers, dtype=dtype)
        shifted = torch.empty(t.numel() + 1, dtype=dtype)[1:].view(t.shape).copy_(t)  # not on 16 bytes
        a, b = (pile_ensemble(x, y, iterations=1, **how).logits for x in (t, shifted))
        assert torch.equal(a, b)
        check_ensemble(t, y, how, iterations=1)


# -- the queries' pulls on weights that all share


def pulls_of(t, y, prior, where, how, **options):
    given = RankingBatch(teacher_logits=t, labels=y, prior=prior, **where)
    return backend.pulls(given, ensemble_options(pairwise=how["pairwise"], **options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ends", [[1100], [1030, 1031, 1031, 1200], [3, 10, 250, 255, 260]])
def test_pulls_of_lists_in_pieces_and_beyond_shared_memory(how, ends, dtype):
    _, t, y, _ = make(ends[-1] + 2, 1, 3, missing=0.2, unlabelled=0.1)
    t[0, : ends[0], 1] = NAN  # a teacher that scored nothing of the first query
    prior = torch.tensor([0.5, 0.25, torch.finfo(torch.float32).tiny], dtype=dtype)
    where = dict(cu_seqlens=torch.tensor([0, *ends]))
    for options in (dict(), dict(pair_weight="gain_gap", margin=0.2, normalize="minmax")):
        got = pulls_of(t[0], y[0], prior, where, how, **options)
        exact = RankingBatch(teacher_logits=t[0].double(), labels=y[0], prior=prior.double(), **where)
        for a, b in zip(got, torch_reference.pulls(exact, ensemble_options(**options)), strict=True):
            same(a.double(), b, rtol=1e-5, atol=3e-6)


def test_pulls_with_a_loss_that_needs_no_ensemble(how):
    z, t, y, _ = make(20, 3, 3)
    prior = torch.tensor([0.2, 0.5, 0.3])
    loss, beside = pile_loss_and_pulls(
        z.requires_grad_(), t, y, None, None, prior, "cuda", dict(alpha=0, iterations=0, pairwise=how["pairwise"])
    )
    assert torch.equal(loss, pile_loss(z, t, y, alpha=0, **how))
    assert torch.equal(beside, pulls_of(t, y, prior, {}, how)[0])


# -- what holds to the last bit


def everything(z, t, y, **how):
    """Every output of every op, for every term."""
    prior = torch.arange(1.0, t.shape[-1] + 1)
    outputs = [*pulls_of(t, y, prior, {}, how), pile_ensemble(t, y, prior=prior, iterations=0, **how).logits]
    for granularity in ("document", "query"):
        options = dict(granularity=granularity, return_weights=True, return_trace=True, iterations=2)
        outputs += pile_ensemble(t, y, **options, **how)
    weights = dict(weights=torch.linspace(0, 2, z.numel()).view(z.shape), query_weights=torch.linspace(0.5, 1, len(z)))
    for loss in losses(iterations=2):
        for own in (dict(), weights) if not loss.repeats else ():
            outputs += run(loss.call, z, t, y, reduction="none", **how, **own)
    return [x.nan_to_num(-7.0) for x in outputs]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("n", [13, 40, 150])
def test_the_order_threads_run_in_changes_nothing(how, n):
    z, t, y, _ = make(n, 3, 4, missing=0.2, unlabelled=0.1)
    first = everything(z, t, y, **how)
    for order in ("backward", "random", "random", "forward"):
        assert module.set_order(order)
        assert equal(everything(z, t, y, **how), first), order


def test_a_query_gives_the_same_bits_in_any_batch(how):
    # One query: a row per four lanes, a block. Many: blocks of four rows, a warp each.
    z, t, y, _ = make(40, 70, 4, missing=0.1)
    options = dict(iterations=3, granularity="document", **how)
    many = pile_ensemble(t, y, **options).logits
    assert torch.equal(many[:1], pile_ensemble(t[:1], y[:1], **options).logits)
    assert torch.equal(many[69:], pile_ensemble(t[69:], y[69:], **options).logits)
    losses, gradient = run(pile_loss, z, t, y, reduction="none", **options)
    own, own_gradient = run(pile_loss, z[:1], t[:1], y[:1], reduction="none", **options)
    assert torch.equal(losses[:1], own) and torch.equal(gradient[:1], own_gradient * 1)


def test_given_weights_give_a_query_the_same_bits_in_any_batch(how):
    _, t, y, _ = make(40, 70, 4, missing=0.1)
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4])
    many = *pulls_of(t, y, prior, {}, how), pile_ensemble(t, y, prior=prior, iterations=0, **how).logits
    alone = *pulls_of(t[:1], y[:1], prior, {}, how), pile_ensemble(t[:1], y[:1], prior=prior, iterations=0, **how).logits
    assert equal([x[:1] for x in many], alone)


# -- the terms, and weights, on lists in pieces


@pytest.mark.parametrize("packed, labels, pair_weight", [(False, "grades", None), (True, "continuous", "gain_gap")])
def test_terms_of_lists_in_pieces(how, packed, labels, pair_weight):
    """The packed ones with weights."""
    z, t, y, where = make(1100, 1, 1, labels=labels, missing=0.1, unlabelled=0.1, masked=0.05, packed=packed)
    z = (50 * z).round() / 50  # some are equal
    if packed:
        weights = 3 * torch.rand(z.shape)
        weights[torch.rand(z.shape) < 0.2] = 0
        where |= dict(weights=weights, query_weights=torch.tensor([0.7]))
    distillations = itertools.cycle(terms.defaults("distill"))
    for label_loss, distillation in zip(terms.defaults("label"), distillations, strict=False):
        options = dict(distillation=distillation, label_loss=label_loss, pair_weight=pair_weight, alpha=0.5, iterations=0)
        check_loss(pile_loss, z, t, y, how, **options, **where)


def test_what_cannot_weigh_breaks_its_query_and_no_other(how):
    """On a device nobody looks for it beforehand."""
    z, t, y, _ = make(40, 5, 3)
    given = RankingBatch(
        student_logits=z, teacher_logits=t, labels=y.clone(), weights=torch.ones_like(z), query_weights=torch.ones(5)
    )
    given.labels[1, 7], given.weights[2, 3], given.query_weights[3], given.query_weights[4] = -1, -0.5, NAN, 0
    of_ensemble = ensemble_options(granularity="document", pairwise=how["pairwise"])
    for label_loss, broken in (("softmax", [1, 2, 3]), ("logistic", [2, 3])):  # whose labels may be negative
        options = dict(alpha=0.5, label_loss=label_loss, reduction="none", pairwise=how["pairwise"])
        want, want_gradient = run(pile_loss, z, t, y, granularity="document", backend="torch", **options)
        value, gradient, _ = backend.pile_loss(given, of_ensemble, loss_options(**options), True, False)
        assert value[broken].isnan().all() and gradient[broken].isnan().all()
        assert value[4] == 0 and (gradient[4] == 0).all()
        same(value[0], want[0])
        same(0.5 * gradient[0], want_gradient[0])  # what `run` multiplies by


# -- shapes and layouts of its own


def test_a_list_longer_than_shared_memory_among_short_ones(how):
    cu_seqlens = torch.tensor([0, 3, 10, 250, 255, 260, 270, 271, 271])
    z, t, y, _ = make(275, 1, 3, missing=0.1)
    options = dict(cu_seqlens=cu_seqlens, iterations=2)
    check_ensemble(t[0], y[0], how, **options)
    check_loss(pile_loss, z[0], t[0], y[0], how, alpha=0.5, **options)


def test_which_lists_are_short():
    device = module.device(0)

    def plan(*shape, packed=False, sweeps=10, direct=False):
        return module.plan_short(*shape[:2], packed, shape[2], sweeps, direct, device)

    assert plan(8, 32, 4).warps and not plan(8, 64, 4).warps
    assert plan(1, 512, 4).capacity > 512 and plan(1, 1025, 4).capacity == 0
    assert plan(1000, 512, 4).capacity == 0 and plan(1000, 512, 4, direct=True).capacity > 512
    assert plan(2, 500, 100).capacity == 0  # 100 teachers do not fit beside 500 documents
    assert plan(10, 1000, 3, packed=True).scratch_bytes > 0
    assert plan(4, 900, 4).capacity == 0 and plan(4, 900, 4, sweeps=0).capacity > 900  # a loss alone is soon done
    assert plan(2**18, 2**27, 3, packed=True).capacity == 0  # a workspace beyond 2^31 words


@pytest.mark.parametrize("cu_seqlens", [[0, 5, 3, 12], [-4, 2, 99], [7, 7]])
def test_offsets_that_lead_nowhere_stay_inside(how, cu_seqlens):
    """On a device nobody reads them beforehand: the numbers may be nonsense, the addresses must not."""
    z, t, y, _ = make(10, 1, 2)
    pile_loss(z[0].requires_grad_(), t[0], y[0], cu_seqlens=torch.tensor(cu_seqlens), **how).backward()
