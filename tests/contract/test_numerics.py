"""The numerics contract: every way, dtype, layout, term and option against the float64 reference, on random batches."""

import pytest
import torch
from contract.problems import (
    NAN,
    check_ensemble,
    check_loss,
    close,
    largest,
    make,
    run,
    same,
    terms_of,
)  # fmt: skip

import pile_fast
from pile_fast import pile_loss
from pile_fast.backends import cpp

DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.float16]  # float32 most of all
PAIR_WEIGHTS = [None, "label_gap", "gain_gap"]
DATA = dict(
    queries=[1, 2, 3],
    teachers=[1, 2, 3, 5, 8],
    labels=["grades", "continuous"],
    missing=[0.0, 0.4, 0.9],
    unlabelled=[0.0, 0.0, 0.3, 1.0],
    masked=[0.0, 0.3],
    packed=[False, False, True],
    dtype=DTYPES,
    seed=range(1000),
)


def problem_of(sample):
    data = {name: sample.pop(name) for name in ("n", "spread", *DATA) if name in sample}
    return *make(**data), sample


@pytest.mark.axes(
    **DATA,
    granularity=["shared", "document", "query"],
    normalize=["zscore", "center", "none", "minmax", "logit"],
    pair_weight=PAIR_WEIGHTS,
    temperature=[0.5, 1.0, 2.0, 0.1],
    margin=[0.0, 0.3, -0.2],
    iterations=[0, 1, 3, 10],
    return_trace=[True, False],
)
def test_ensembles(how, target, sample):
    _, t, y, where, options = problem_of(dict(sample))
    options["iterations"] = min(options["iterations"], target.iterations)
    if options["normalize"] == "logit":
        t = t.sigmoid()
    check_ensemble(t, y, how, **where, **options)


@pytest.mark.axes(
    **DATA,
    spread=[0.1, 1.0, 5.0, 20.0, 100.0, 300.0],
    alpha=[0.0, 0.3, 0.5, 1.0],
    distillation=terms_of("distill"),
    label_loss=terms_of("label"),
    granularity=["shared", "document", "query"],
    pair_weight=PAIR_WEIGHTS,
    reduction=["mean", "sum", "none"],
    iterations=[0, 1, 3, 10],
)
def test_losses(how, target, sample):
    z, t, y, where, options = problem_of(dict(sample))
    options["iterations"] = min(options["iterations"], target.iterations)
    check_loss(pile_loss, z, t, y, how, **where, **options)


@pytest.fixture
def exact(how, target):
    """Who computes what long lists should give."""
    if how["backend"] == "torch":
        pytest.skip("the reference against itself, at n x n memory")
    return dict(backend="torch") if cpp.unavailable() or target.gpu else dict(backend="cpp", pairwise="direct")


@pytest.mark.needs("long_lengths")
@pytest.mark.parametrize("labels", ["grades", "continuous"])
def test_long_lists(how, target, exact, granularity, labels):
    for n in target.long_lengths:
        z, t, y, _ = make(n, 1, labels=labels, missing=0.1, unlabelled=0.1)
        check_ensemble(t, y, how, exact, granularity=granularity, iterations=3)
        check_loss(pile_loss, z, t, y, how, exact, alpha=0.5, granularity=granularity, iterations=3)


@pytest.mark.needs("long_lengths")
def test_long_packed_lists(how, target, exact):
    lengths = [1, 0, *target.long_lengths, 130]
    z, t, y, _ = make(sum(lengths) + 5, 1, missing=0.1, unlabelled=0.1)
    options = dict(cu_seqlens=torch.tensor([0, *lengths]).cumsum(0), iterations=2, pair_weight="label_gap", margin=0.2)
    check_ensemble(t[0], y[0], how, exact, **options)
    check_loss(pile_loss, z[0], t[0], y[0], how, exact, alpha=0.5, **options)


def test_more_cells_than_a_grid_has(linear):
    how, n = linear
    _, t, y, _ = make(n, 1, 2)
    check_ensemble(t, y, how, temperature=0.001, iterations=1)


@pytest.mark.needs("float64")
def test_direct_sum_in_double_equals_the_reference_on_a_list_that_teams_share(how):
    z, t, y, _ = make(2500, queries=1, labels="continuous", dtype=torch.float64)
    got = run(pile_loss, z, t, y, alpha=0.5, iterations=2, **how)
    want = run(pile_loss, z, t, y, alpha=0.5, iterations=2, backend="torch")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("normalize", ["zscore", "none"])
def test_huge_logits_stay_finite_and_in_range(how, target, size, normalize):
    z, t, y, _ = make(min(60, target.documents), spread=size)
    options = dict(normalize=normalize, iterations=min(10, target.iterations))
    assert pile_fast.pile_ensemble(t, y, **options, **how).logits.isfinite().all()
    loss, gradient = run(pile_loss, z, t, y, alpha=0.5, **options, **how)
    want, want_gradient = run(pile_loss, z.double(), t.double(), y, alpha=0.5, backend="torch", **options)
    assert loss.isfinite() and gradient.isfinite().all()
    if normalize == "zscore":
        same(loss.double(), want, rtol=1e-5, atol=0)
        assert largest(gradient.double() - want_gradient) <= 1e-5 * largest(want_gradient)


def test_raw_logits_far_from_zero_beside_a_document_that_nobody_scored(how):
    _, t, y, _ = make(40)
    t += 500
    t[:, 3] = NAN
    check_ensemble(t, y, how, normalize="none", iterations=2)
    check_ensemble(t, y, how, normalize="minmax", iterations=2)


def test_probabilities_at_their_ends(how):
    t = torch.tensor([[[0.0, 1e-30, 1.0], [1e-9, 1.0, 1.0], [0.5, 0.5, 1.0], [1.0, 1 - 1e-7, 1.0], [NAN, 0.25, 1.0]]])
    check_ensemble(t, torch.tensor([[0, 1, 0, 2, 1]]), how, normalize="logit", iterations=2)


def test_half_precision_subnormals(how):
    _, t, y, _ = make(20, 1, 8)
    t = (t * 3e-6).half()
    got = pile_fast.pile_ensemble(t, y, iterations=3, **how).logits
    close(got, got, pile_fast.pile_ensemble(t.double(), y, iterations=3, backend="torch").logits, 1e-5)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float64, torch.bfloat16]
)
def test_labels_of_any_real_dtype(how, dtype):
    z, t, y, _ = make(30)
    y = (y > 2) if dtype is torch.bool else y
    options = dict(alpha=0.5, pair_weight="label_gap", iterations=2)
    same(pile_loss(z, t, y.to(dtype), **options, **how), pile_loss(z, t, y.float(), backend="torch", **options))


def test_labels_that_only_float64_tells_apart(how):
    t = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    y = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    logits = pile_fast.pile_ensemble(t, y, **how).logits
    assert logits[0, 1] > logits[0, 0]


def test_labels_of_either_sign_and_zero(how):
    t, y = torch.randn(1, 6, 3), torch.tensor([[-1.5, 0.0, -0.0, 2.0, -3.0, 1e30]])
    check_ensemble(t, y, how, pair_weight="label_gap", iterations=3)


@pytest.mark.needs("float64")
def test_mixed_dtypes_compute_in_the_widest(how):
    z, t, y, _ = make(20)
    loss = pile_loss(z.double(), t, y, **how)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, pile_loss(z.double(), t.double(), y, backend="torch"), rtol=1e-9, atol=0)


@pytest.mark.needs("kernels")
def test_float64_is_refused_by_name(how):
    z, t, y, _ = make(4)
    with pytest.raises(RuntimeError, match=f"backend '{how['backend']}' computes in float32, got float64"):
        pile_loss(z.double(), t, y, **how)


def test_strides_do_not_matter(how):
    z, t, y, where = make(37, missing=0.2, masked=0.2)
    strange = (
        z.t().contiguous().t(),
        t.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        torch.stack([y, y], -1)[..., 0],
        where["mask"].repeat_interleave(2, 1)[:, ::2],
    )
    assert not any(x.is_contiguous() for x in strange)
    options = dict(alpha=0.5, iterations=2, **how)
    got, want = run(pile_loss, *strange[:3], mask=strange[3], **options), run(pile_loss, z, t, y, **where, **options)
    for a, b in zip(got, want, strict=True):
        same(a, b)
    one, expanded = t[:, :, :1], t[:, :, :1].expand(-1, -1, 3)
    same(*(pile_fast.pile_ensemble(x, y, iterations=2, **how).logits for x in (one, expanded)))
