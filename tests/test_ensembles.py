"""The other ensembles: one battery of properties over all of them, then each formula by hand or by brute force."""

import inspect
import math

import numpy as np
import pytest
import torch
from contract.problems import SCALES, make, relative_error
from scipy.optimize import minimize

import pile_fast.ensembles as ensembles
from pile_fast.ensembles import ENSEMBLES, NEEDS_LABELS, NEEDS_STUDENT, StackingEnsemble

NAN = math.nan


def call(name, teachers, labels, student, **options):
    """Every ensemble by one call: the registry's, "best/query", and "stacking", fitted on the batch itself."""
    if name == "stacking":
        normalize = options.pop("normalize", "zscore")
        return StackingEnsemble(normalize=normalize).fit(teachers, labels, **options)(teachers, **options)
    if name == "best/query":
        options["selection"] = "query"
    if name == "pile":  # a query on its own, as in the others; tests/contract has weights that queries share
        options = {"granularity": "document"} | options
    if name in NEEDS_STUDENT:
        options["student_logits"] = student
    return ENSEMBLES[name.split("/")[0]](teachers, labels, **options)


NAMES = (*ENSEMBLES, "best/query", "stacking")
every_ensemble = pytest.mark.parametrize("name", NAMES)


def batch(seed=0, queries=7, width=9, teachers=4, dtype=torch.float64, missing=0.2):
    """Teachers on different scales, with missing scores; unlabelled documents; queries of every length from 0 on."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (queries, width), generator=rng).to(dtype)
    noise = torch.randn(queries, width, teachers, generator=rng, dtype=dtype)
    t = (labels.unsqueeze(-1) * torch.linspace(0.2, 1, teachers, dtype=dtype) + noise) * torch.arange(1, teachers + 1)
    t[torch.rand(t.shape, generator=rng) < missing] = NAN
    labels[torch.rand(labels.shape, generator=rng) < 0.15] = NAN
    student = torch.randn(queries, width, generator=rng, dtype=dtype)
    return t, labels, student, torch.arange(width) < (torch.arange(queries) % (width + 1))[:, None]


def close(a, b, tolerance=1e-8):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance, equal_nan=True)


@every_ensemble
@pytest.mark.parametrize("normalize", ["zscore", "center", "none"])
def test_shapes_and_missing_documents(name, normalize):
    t, labels, student, mask = batch()
    before = [x.clone() for x in (t, labels, student)]
    out = call(name, t, labels, student, mask=mask, normalize=normalize)
    scored = mask & ~t.isnan().all(-1)
    assert out.logits.shape == labels.shape and out.logits.dtype is torch.float64
    assert torch.equal(~out.logits.isnan(), scored)
    assert out.weights.shape in ((4,), (7, 4), (7, 9, 4)) and out.weights.isfinite().all()
    if name != "stacking":
        held = out.weights.sum(-1)
        close(held, torch.where(held > 0, 1.0, 0.0).double())
        assert (out.weights >= 0).all()
    for x, y in zip(before, (t, labels, student), strict=True):
        close(x, y, 0)


@every_ensemble
def test_logits_stay_between_the_teachers(name):
    if name in ("rrf", "stacking"):
        pytest.skip("not an average of the teachers' logits")
    t, labels, student, mask = batch()
    s = call(name, t, labels, student, mask=mask, normalize="none").logits
    inside = (s >= t.nan_to_num(math.inf).amin(-1) - 1e-9) & (s <= t.nan_to_num(-math.inf).amax(-1) + 1e-9)
    assert inside[~s.isnan()].all()


@every_ensemble
def test_packed_is_padded(name):
    t, labels, student, mask = batch()
    padded = call(name, t, labels, student, mask=mask)
    starts = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    # Two documents more than the queries hold: they belong to none.
    tail = [torch.cat([x[mask], x[-1, -2:]]) for x in (t, labels, student)]
    packed = call(name, *tail, cu_seqlens=starts)
    close(packed.logits[:-2], padded.logits[mask])
    assert packed.logits[-2:].isnan().all()
    if padded.weights.dim() == 3:
        close(packed.weights[:-2], padded.weights[mask])
        assert (packed.weights[-2:] == 0).all()
    else:
        close(packed.weights, padded.weights)


@every_ensemble
def test_padding_changes_nothing(name):
    t, labels, student, mask = batch()
    wide = [torch.cat([x, torch.full_like(x[:, :5], v)], 1) for x, v in ((t, 1e30), (labels, 9), (student, NAN), (mask, 0))]
    narrow, wider = call(name, t, labels, student, mask=mask), call(name, *wide[:3], mask=wide[3])
    close(wider.logits[:, :9], narrow.logits)
    assert wider.logits[:, 9:].isnan().all()
    close(wider.weights[:, :9] if narrow.weights.dim() == 3 else wider.weights, narrow.weights)


@every_ensemble
def test_permuting_documents_permutes_logits(name):
    t, labels, student, mask = batch()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    out = call(name, t, labels, student, mask=mask)
    permuted = call(name, t[:, order], labels[:, order], student[:, order], mask=mask[:, order])
    close(permuted.logits, out.logits[:, order], 1e-6)
    close(permuted.weights, out.weights[:, order] if out.weights.dim() == 3 else out.weights, 1e-6)


@every_ensemble
def test_permuting_teachers_permutes_weights(name):
    t, labels, student, mask = batch()
    order = [2, 0, 3, 1]
    out, permuted = call(name, t, labels, student, mask=mask), call(name, t[..., order], labels, student, mask=mask)
    close(permuted.logits, out.logits, 1e-6)
    close(permuted.weights, out.weights[..., order], 1e-6)


@every_ensemble
def test_a_teacher_missing_everywhere_is_dropped(name):
    t, labels, student, mask = batch()
    t[..., 1] = NAN
    keep = [0, 2, 3]
    out, dropped = call(name, t, labels, student, mask=mask), call(name, t[..., keep], labels, student, mask=mask)
    close(out.logits, dropped.logits, 1e-6)
    close(out.weights[..., keep], dropped.weights, 1e-6)
    assert (out.weights[..., 1] == 0).all()


@every_ensemble
def test_a_query_is_on_its_own(name):
    if name in ("best", "stacking"):
        pytest.skip("one choice for all queries")
    t, labels, student, mask = batch()
    together = call(name, t, labels, student, mask=mask)
    for q in range(7):
        alone = call(name, t[q : q + 1], labels[q : q + 1], student[q : q + 1], mask=mask[q : q + 1])
        close(alone.logits[0], together.logits[q])
        close(alone.weights[0], together.weights[q])


@every_ensemble
def test_shift_and_scale_of_a_teacher_change_nothing(name):
    t, labels, student, mask = batch()
    moved = t.clone()
    moved[..., 2] = 7 * moved[..., 2] - 30
    out, after = call(name, t, labels, student, mask=mask), call(name, moved, labels, student, mask=mask)
    close(out.logits, after.logits, 1e-6)
    close(out.weights, after.weights, 1e-6)


@every_ensemble
@pytest.mark.parametrize("normalize", ["zscore", "none"])
def test_extreme_logits(name, normalize):
    rng = torch.Generator().manual_seed(2)
    t = torch.randint(0, 2, (5, 8, 3), generator=rng) * 2e4 - 1e4
    labels, student = torch.randint(0, 3, (5, 8), generator=rng), torch.full((5, 8), 1e4)
    out = call(name, t, labels, student, normalize=normalize)
    assert out.logits.isfinite().all() and out.weights.isfinite().all()


@every_ensemble
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(name, dtype):
    t, labels, student, mask = batch(dtype=torch.float32)
    rounded = [x.to(dtype) for x in (t, labels, student)]
    out = call(name, *rounded, mask=mask)
    assert out.logits.dtype is torch.float32
    close(out.logits.double(), call(name, *(x.double() for x in rounded), mask=mask).logits, 1e-4)


@every_ensemble
def test_no_preference_gives_the_mean_or_needs_none(name):
    """Equal labels, and one document: what learns from labels has nothing to learn and falls back on the mean."""
    t, _, student, mask = batch(missing=0)
    labels = torch.ones(7, 9)
    out = call(name, t, labels, student, mask=mask)
    if name in NEEDS_LABELS or name in ("best/query", "stacking"):
        close(out.logits, ensembles.mean_ensemble(t, mask=mask).logits)
    one = call(name, t[:, :1], labels[:, :1], student[:, :1])
    assert (one.logits == 0).all() and one.weights.isfinite().all()


@every_ensemble
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
def test_nothing(name, shape):
    out = call(name, torch.zeros(*shape, 3), torch.zeros(shape), torch.zeros(shape))
    assert out.logits.shape == shape and out.weights.isfinite().all()
    flat = call(name, torch.zeros(0, 3), torch.zeros(0), torch.zeros(0), cu_seqlens=torch.zeros(shape[0] + 1).int())
    assert flat.logits.shape == (0,)


@every_ensemble
def test_all_masked(name):
    t, labels, student, mask = batch()
    out = call(name, t, labels, student, mask=torch.zeros_like(mask))
    assert out.logits.isnan().all() and out.weights.isfinite().all()


@every_ensemble
def test_a_teacher_alone_is_the_ensemble(name):
    if name in ("rrf", "stacking"):
        pytest.skip("not an average of the teachers' logits")
    t, labels, student, mask = batch()
    close(call(name, t[..., :1], labels, student, mask=mask, normalize="none").logits, torch.where(mask, t[..., 0], NAN))


@every_ensemble
def test_bad_arguments(name):
    t, labels, student, _ = batch()
    with pytest.raises(ValueError, match=r"teacher_logits: expected \(Q, N, M\)"):
        call(name, t[0], labels, student)
    with pytest.raises(ValueError, match=r"labels: expected \(Q, N\) = \(7, 9\)"):
        call(name, t, labels[:, :8], student)
    with pytest.raises(ValueError, match="normalize: expected one of 'zscore', .*, got 'max'"):
        call(name, t, labels, student, normalize="max")
    with pytest.raises(TypeError, match="teacher_logits: expected a torch.Tensor, got None"):
        call(name, None, labels, student)
    with pytest.raises(ValueError, match="teacher_logits: requires grad"):
        call(name, t.clone().requires_grad_(), labels, student)
    if name in NEEDS_LABELS or name in ("best/query", "stacking"):
        with pytest.raises(TypeError, match="labels: expected a torch.Tensor, got None"):
            call(name, t, None, student)
    else:
        close(call(name, t, None, student).logits, call(name, t, labels, student).logits, 0)
    if name in NEEDS_STUDENT:
        with pytest.raises(TypeError, match="student_logits: expected a torch.Tensor, got None"):
            call(name, t, labels, None)


def test_registry():
    assert list(ENSEMBLES) == ["mean", "best", "rrf", "ca_mkd", "ebkd", "ae_kd", "govern", "pile"]
    for name, function in ENSEMBLES.items():
        parameters = inspect.signature(function).parameters
        assert list(parameters)[:2] == ["teacher_logits", "labels"]
        assert (parameters["labels"].default is inspect.Parameter.empty) == (name in NEEDS_LABELS)
        assert ("student_logits" in parameters) == (name in NEEDS_STUDENT)


def test_student_may_carry_a_gradient():
    t, _, student, mask = batch()
    for name in NEEDS_STUDENT:
        assert not call(name, t, None, student.requires_grad_(), mask=mask).logits.requires_grad


# The formulas.


def zscored(t, axis=0):
    return (t - t.mean(axis)) / t.std(axis)


def label_loss(t, labels):
    """ℓ_qm of one query, by its definition."""
    losses = [
        np.log1p(np.exp(-(t[i] - t[j])))
        for i in range(len(labels))
        for j in range(len(labels))
        if labels[i] > labels[j] and not np.isnan(t[i] - t[j])
    ]
    return np.mean(losses) if losses else math.log(2)


def full_batch(seed, queries=6, width=8, teachers=3):
    t, _, student, _ = batch(seed, queries, width, teachers, missing=0)
    labels = torch.randint(0, 3, (queries, width), generator=torch.Generator().manual_seed(seed)).double()
    return t, labels, student


def test_mean():
    t = torch.tensor([[[1.0, 2.0, 6.0], [4.0, NAN, 0.0], [NAN, NAN, NAN]]])
    mean = ensembles.mean_ensemble
    close(mean(t, normalize="none").logits, torch.tensor([[3.0, 2.0, NAN]]))
    prior = torch.tensor([2.0, 1.0, 1.0])
    close(mean(t, normalize="none", prior=prior).logits, torch.tensor([[(2 + 2 + 6) / 4, 8 / 3, NAN]]), 1e-6)
    close(mean(t, normalize="none", prior=prior).weights, torch.tensor([[0.5, 0.25, 0.25]]))
    out = mean(t, normalize="none", prior=torch.tensor([[0.0, 3.0, 0.0]]))
    close(out.logits, torch.tensor([[2.0, NAN, NAN]]))
    close(mean(t, normalize="center").logits, torch.tensor([[(-1.5 + 0 + 3) / 3, (1.5 - 3) / 2, NAN]]), 1e-6)


@pytest.mark.parametrize("at_once", [2**24, 200, 1])
def test_label_losses(at_once, monkeypatch):
    monkeypatch.setattr(ensembles.base, "PAIRS_AT_ONCE", at_once)
    t, labels, _, mask = batch(3)
    teachers = ensembles.base.Teachers(t, labels, mask, None, "none")
    wanted = [[label_loss(t[q, mask[q], m].numpy() / 2, labels[q, mask[q]].numpy()) for m in range(4)] for q in range(7)]
    close(ensembles.base.label_losses(teachers, 2.0), torch.tensor(wanted))


def test_best_teacher():
    t, labels, _ = full_batch(4)
    z = zscored(t.numpy().transpose(1, 0, 2))
    loss = np.array([[label_loss(z[:, q, m], labels[q].numpy()) for m in range(3)] for q in range(6)])
    best = loss.sum(0).argmin()
    out = ensembles.best_teacher_ensemble(t, labels)
    assert out.weights.argmax() == best
    close(out.logits, torch.tensor(z[..., best].T))
    out = ensembles.best_teacher_ensemble(t, labels, selection="query")
    assert out.weights.argmax(1).tolist() == loss.argmin(1).tolist() and len(set(loss.argmin(1))) > 1
    with pytest.raises(ValueError, match="selection: expected one of 'global', 'query'"):
        ensembles.best_teacher_ensemble(t, labels, selection="document")


@pytest.mark.parametrize("selection", ["global", "query"])
def test_best_teacher_missing_at_a_document(selection):
    """The next best stands in; a teacher that says nothing is worse than a right and better than a wrong one."""
    t = torch.tensor([[[3.0, 0.0, -3.0], [NAN, 0.0, -2.0], [1.0, 0.0, -1.0], [NAN, NAN, 7.0]]])
    out = ensembles.best_teacher_ensemble(t, torch.tensor([[2.0, 1.0, 0.0, NAN]]), normalize="none", selection=selection)
    close(out.logits, torch.tensor([[3.0, 0.0, 1.0, 7.0]]))
    close(out.weights.view(3), torch.tensor([1.0, 0.0, 0.0]))


def test_rrf():
    t = torch.tensor([[[9.0, 5.0], [7.0, 5.0], [NAN, 8.0], [8.0, NAN]]])
    # Ranks: 1, 3, -, 2 and 2.5, 2.5, 1, -
    wanted = torch.tensor([[1 / 3 + 1 / 4.5, 1 / 5 + 1 / 4.5, 2 / 3, 2 / 4]])
    close(ensembles.rrf_ensemble(t, normalize="none", k=2).logits, wanted, 1e-6)
    centred = wanted - wanted.mean()
    close(ensembles.rrf_ensemble(t, k=2).logits, centred / centred.square().mean().sqrt(), 1e-5)
    prior = torch.tensor([3.0, 1.0])
    weighted = torch.tensor([[1.5 / 3 + 0.5 / 4.5, 1.5 / 5 + 0.5 / 4.5, 2 / 3, 2 / 4]])
    close(ensembles.rrf_ensemble(t, normalize="none", k=2, prior=prior).logits, weighted, 1e-6)
    # Two documents, first and second twice each: a tie, also where the four terms are summed in another order.
    t = torch.tensor([[[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]]]).double()
    assert (ensembles.rrf_ensemble(t).logits == 0).all()
    with pytest.raises(ValueError, match="k: expected a number >= 0"):
        ensembles.rrf_ensemble(t, k=-1)


def test_ca_mkd():
    t, labels, _ = full_batch(5)
    z = zscored(t.numpy().transpose(1, 0, 2))
    loss = np.array([[label_loss(z[:, q, m], labels[q].numpy()) for m in range(3)] for q in range(6)])
    weights = (1 - np.exp(loss) / np.exp(loss).sum(1, keepdims=True)) / 2
    out = ensembles.ca_mkd_ensemble(t, labels)
    close(out.weights, torch.tensor(weights))
    close(out.logits, torch.tensor(np.einsum("nqm,qm->qn", z, weights)))


def test_ebkd():
    t, _, _ = full_batch(6)
    z = zscored(t.numpy().transpose(1, 0, 2)) / 0.5
    p = np.exp(z) / np.exp(z).sum(0)
    entropy = -(p * np.log(p)).sum(0)
    weights = (1 - entropy / entropy.sum(1, keepdims=True)) / 2
    out = ensembles.ebkd_ensemble(t, temperature=0.5)
    close(out.weights, torch.tensor(weights))
    close(out.logits, torch.tensor(np.einsum("nqm,qm->qn", z * 0.5, weights)))


def test_ebkd_does_not_take_few_scores_for_sureness():
    t = torch.zeros(1, 16, 3)
    t[0, 2:, 1], t[0, 1:, 2] = NAN, NAN  # all three know nothing: of sixteen, two, one document
    close(ensembles.ebkd_ensemble(t, normalize="none").weights, torch.full((1, 3), 1 / 3), 1e-6)


@pytest.mark.parametrize("max_weight", [1.0, 0.5])
def test_ae_kd_solves_its_programme(max_weight):
    t, _, student = full_batch(7, teachers=4)
    weights = ensembles.ae_kd_ensemble(t, student_logits=student, normalize="none", max_weight=max_weight).weights
    pull = student.softmax(1).unsqueeze(-1) - t.softmax(1)
    for q in range(6):
        gram = (pull[q].T @ pull[q]).numpy()
        best = minimize(
            lambda w, g=gram: w @ g @ w / g.max(),
            np.full(4, 1 / 4),
            jac=lambda w, g=gram: 2 * g @ w / g.max(),
            bounds=[(0, max_weight)] * 4,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 500},
        )
        close(weights[q], torch.tensor(best.x), 1e-5)


def test_ae_kd_two_teachers_in_closed_form():
    t, _, student = full_batch(8, teachers=2)
    a, b = (student.softmax(1).unsqueeze(-1) - t.softmax(1)).unbind(-1)
    first = (((b - a) * b).sum(1) / (a - b).square().sum(1)).clamp(0, 1)  # the least norm on the segment from a to b
    out = ensembles.ae_kd_ensemble(t, student_logits=student, normalize="none")
    close(out.weights[:, 0], first)


def test_ae_kd_bounds():
    t, _, student, mask = batch(9, missing=0)
    mean = ensembles.mean_ensemble(t, mask=mask)
    bounded = ensembles.ae_kd_ensemble(t, student_logits=student, mask=mask, max_weight=0.01)
    close(bounded.weights, mean.weights)
    with pytest.raises(ValueError, match="max_weight: expected a number > 0 and <= 1"):
        ensembles.ae_kd_ensemble(t, student_logits=student, max_weight=1.5)


def test_ae_kd_teacher_of_one_document_takes_no_part():
    t, _, student = full_batch(16)
    t[:, 1:, 1] = NAN
    out = ensembles.ae_kd_ensemble(t, student_logits=student)
    close(out.weights[:, [0, 2]], ensembles.ae_kd_ensemble(t[..., [0, 2]], student_logits=student).weights, 1e-6)
    assert (out.weights[:, 1] == 0).all()


def test_teachers_of_no_weight_are_averaged():
    t = torch.tensor([[[1.0, 5.0, 9.0], [1.0, 3.0, NAN]]])
    for little in (0.0, 1e-7):
        prior = torch.tensor([little, 0.0, 1.0])
        teachers = ensembles.base.Teachers(t, None, None, None, "none")
        close(teachers.combine(prior), torch.tensor([[9.0, 2.0]]), 1e-5)


def test_capped_simplex():
    rng = torch.Generator().manual_seed(10)
    v = torch.randn(200, 5, generator=rng, dtype=torch.float64) * 3
    cap = torch.where(torch.rand(200, 5, generator=rng) < 0.2, 0.0, 0.6).double()
    cap[:, :2] = 0.6
    w = ensembles.ae_kd._capped_simplex(v, cap)
    close(w.sum(1), torch.ones(200).double())
    assert (w >= 0).all() and (w <= cap).all()
    inner = (w > 1e-9) & (w < cap - 1e-9)  # one λ for all of a row that are not at a bound
    shift = torch.where(inner, v - w, NAN)
    close(torch.where(inner, shift - shift.nanmean(1, keepdim=True), 0.0), torch.zeros_like(v))


def test_govern():
    t = torch.tensor([[[1.0, 3.0, -4.0], [-1.0, -2.0, 5.0], [1.0, -3.0, NAN], [0.0, 2.0, NAN], [0.0, 0.0, 0.0]]])
    # Votes: up, down, drawn, up (a teacher that agrees with the student has no vote), all agree.
    out = ensembles.govern_ensemble(t, student_logits=torch.zeros(1, 5), normalize="none")
    close(out.logits, torch.tensor([[2.0, -1.5, -1.0, 2.0, 0.0]]))
    close(out.weights[0, 0], torch.tensor([0.5, 0.5, 0.0]))
    close(out.weights[0, 2], torch.tensor([0.5, 0.5, 0.0]))
    # The student is calibrated like a teacher: its own scale decides nothing.
    t, _, student = full_batch(11)
    a, b = (ensembles.govern_ensemble(t, student_logits=z).logits for z in (student, 100 * student - 5))
    close(a, b)


def test_stacking_minimises_its_objective():
    t, labels, _ = full_batch(12)
    z = zscored(t.numpy().transpose(1, 0, 2))

    def objective(w):
        return sum(label_loss(z[:, q] @ w, labels[q].numpy()) for q in range(6)) + w @ w / (2 * 3.0)

    wanted = minimize(objective, np.zeros(3), method="BFGS", options={"gtol": 1e-8}).x
    stacking = StackingEnsemble(C=3.0).fit(t, labels)
    close(stacking.weights, torch.tensor(wanted), 1e-5)
    close(stacking(t).logits, torch.tensor(np.einsum("nqm,m->qn", z, wanted)), 1e-4)


def test_stacking_rescales_where_a_teacher_is_missing():
    stacking = StackingEnsemble(normalize="none")
    stacking.weights = torch.tensor([2.0, -1.0, 0.0])
    t = torch.tensor([[[1.0, 3.0, 5.0], [1.0, NAN, 5.0], [NAN, NAN, 5.0]]])
    close(stacking(t).logits, torch.tensor([[2.0 - 3.0, 1.0 * 3, 5.0 * 3]]))


def test_stacking_learns_which_teacher_to_trust():
    t, labels, _, mask = batch(13, queries=60)  # the teachers grow better from the first to the last
    weights = StackingEnsemble().fit(t, labels, mask=mask).weights
    assert weights.argmax() == 3 and weights[3] > weights[0]


def test_stacking_errors():
    t, labels, _ = full_batch(14)
    with pytest.raises(RuntimeError, match="call fit"):
        StackingEnsemble()(t)
    with pytest.raises(ValueError, match="teacher_logits: expected 3 teachers as in fit, got 2"):
        StackingEnsemble().fit(t, labels)(t[..., :2])
    with pytest.raises(ValueError, match="pairs_per_query: expected an int >= 1, got 0"):
        StackingEnsemble(pairs_per_query=0)


def pairs_of(labels, valid):
    n = len(labels)
    return {(i, j) for i in range(n) for j in range(n) if valid[i] and valid[j] and labels[i] > labels[j]}


def test_some_pairs_are_all_pairs_if_few():
    _, labels, _, mask = batch(15)
    labelled = mask & ~labels.isnan()
    query, above, below, weight = ensembles.stacking._some_pairs(labels, labelled, 100)
    for q in range(7):
        found = [(i.item(), j.item()) for i, j in zip(above[query == q], below[query == q], strict=True)]
        assert len(found) == len(set(found)) and set(found) == pairs_of(labels[q], labelled[q])
        close(weight[query == q].sum(), torch.tensor(1.0 if found else 0.0).double())


def test_some_pairs_of_many():
    labels = torch.zeros(2, 1100)
    labels[0, :100], labels[1, :3] = 1, 1  # 100,000 pairs, and 3 × 97 = 291
    labelled = torch.ones(2, 1100, dtype=torch.bool)
    labelled[1, 100:] = False
    query, above, below, weight = ensembles.stacking._some_pairs(labels, labelled, 1000)
    assert query.bincount().tolist() == [1000, 291]
    first = query == 0
    assert (labels[query, above] > labels[query, below]).all() and labelled[query, below].all()
    assert above[first].unique().numel() == 100 and below[first].unique().numel() > 500
    close(weight[first].sum(), torch.tensor(1.0).double())
    # The same pairs again, whatever else is in the batch and however wide it is.
    alone = ensembles.stacking._some_pairs(labels[:1], labelled[:1], 1000)
    assert torch.equal(alone[1], above[first]) and torch.equal(alone[2], below[first])


# -- scales


@pytest.mark.parametrize("name", sorted(set(ENSEMBLES) - NEEDS_STUDENT))
@pytest.mark.parametrize("offset, scale", SCALES)
def test_calibrates_at_any_offset_and_scale(name, offset, scale):
    _, t, y, _ = make(12, missing=0.2)
    t = (offset + scale * t).float()
    assert relative_error(ENSEMBLES[name](t, y).logits, ENSEMBLES[name](t.double(), y).logits) <= 1e-5


@every_ensemble
def test_infinite_logits_count_as_missing(name):
    z, t, y, _ = make(12, 4)
    for value in (math.inf, -math.inf):
        broken, missing = t.clone(), t.clone()
        broken[0, 3, 1], missing[0, 3, 1] = value, NAN
        a, b = (call(name, x, y, z) for x in (broken, missing))
        assert torch.equal(a.logits, b.logits) and torch.equal(a.weights, b.weights)
