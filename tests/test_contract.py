"""The numerics contract: every backend, pair sum, dtype, layout and option against the float64 reference.

Tolerance, after flash-attention's tests: the bound of the contract, or three times the error that the reference itself makes in
float32 on the same problem where that is larger. Sharp settings (raw logits, low temperature, many steps) amplify rounding in
any implementation.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pile_fast
from pile_fast.backends import cpp

NAN = float("nan")
BACKENDS = [("cpp", "direct"), ("cpp", "chebyshev"), ("cpp", "auto"), ("torch", "auto")]
if cpp.unavailable():
    BACKENDS = BACKENDS[-1:]

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=BACKENDS, ids="-".join)
def how(request):
    return dict(zip(("backend", "pairwise"), request.param, strict=True))


def make(
    n,
    queries=2,
    teachers=3,
    *,
    spread=1.0,
    labels="grades",
    missing=0.0,
    unlabelled=0.0,
    masked=0.0,
    seed=0,
    dtype=torch.float32,
):
    """Student, teachers, labels and mask of a random batch, all in `dtype` but the labels."""
    g = torch.Generator().manual_seed(seed)
    truth = torch.randn(queries, n, 1, generator=g)
    t = spread * (truth + torch.randn(queries, n, teachers, generator=g)) + torch.randn(teachers, generator=g)
    t[torch.rand(t.shape, generator=g) < missing] = NAN
    y = truth[..., 0] + 0.5 * torch.randn(queries, n, generator=g)
    if labels == "grades":
        y = (y * 1.5 + 2).round().clamp(0, 4)
    y[torch.rand(y.shape, generator=g) < unlabelled] = NAN
    z = spread * torch.randn(queries, n, generator=g)
    mask = torch.rand(queries, n, generator=g) >= masked if masked else None
    return z.to(dtype), t.to(dtype), y, mask


def scale_of(t):
    """The largest calibrated logit, about: the contract's unit."""
    return max(t.nan_to_num().abs().max().item(), 1.0) if t.numel() else 1.0


def close(got, dtype_reference, reference, bound):
    """`got` within `bound` of the float64 `reference`, or as near to it as three times what `dtype_reference` reaches."""
    assert (got.isnan() == reference.isnan()).all()
    error = (got.double() - reference).abs().nan_to_num().max().item() if got.numel() else 0.0
    own = (dtype_reference.double() - reference).abs().nan_to_num().max().item() if got.numel() else 0.0
    assert error <= max(bound, 3 * own), f"error {error:.3g}, bound {bound:.3g}, the reference in this dtype {own:.3g}"


OPTIONS = dict(
    granularity=st.sampled_from(["document", "query"]),
    normalize=st.sampled_from(["zscore", "center", "none"]),
    pair_weight=st.sampled_from([None, "label_gap", "gain_gap"]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    margin=st.sampled_from([0.0, 0.3, -0.2]),
    iterations=st.sampled_from([0, 1, 3, 10]),
)
# Around the vector widths (4, 8, 16), the smallest block of the linear sum (96) and past the crossover.
LENGTHS = st.sampled_from([0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 95, 97, 130, 200, 333])
BATCHES = dict(
    n=LENGTHS,
    teachers=st.integers(1, 5),
    labels=st.sampled_from(["grades", "continuous"]),
    missing=st.sampled_from([0.0, 0.4, 0.9]),
    unlabelled=st.sampled_from([0.0, 0.3, 1.0]),
    masked=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 1000),
)
PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@PROPERTY
@given(options=st.fixed_dictionaries(OPTIONS), batch=st.fixed_dictionaries(BATCHES))
def test_ensemble_float32(how, options, batch):
    _, t, y, mask = make(**batch)
    want = pile_fast.pile_ensemble(t.double(), y, mask=mask, backend="torch", return_weights=True, return_trace=True, **options)
    same = pile_fast.pile_ensemble(t, y, mask=mask, backend="torch", return_weights=True, return_trace=True, **options)
    got = pile_fast.pile_ensemble(t, y, mask=mask, return_weights=True, return_trace=True, **how, **options)
    bound = 2e-6 * scale_of(t)
    close(got.logits, same.logits, want.logits, bound)
    close(got.weights, same.weights, want.weights, bound)
    close(got.trace, same.trace, want.trace, 2 * bound)


@PROPERTY
@given(options=st.fixed_dictionaries(OPTIONS), batch=st.fixed_dictionaries(BATCHES))
def test_ensemble_float64(how, options, batch):
    _, t, y, mask = make(dtype=torch.float64, **batch)
    want = pile_fast.pile_ensemble(t, y, mask=mask, backend="torch", return_weights=True, return_trace=True, **options)
    got = pile_fast.pile_ensemble(t, y, mask=mask, return_weights=True, return_trace=True, **how, **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)


LOSS_OPTIONS = dict(
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    distillation=st.sampled_from(["logistic:temperature=0.5", "logistic", "logistic:temperature=3", "mse"]),
    pair_weight=st.sampled_from([None, "label_gap", "gain_gap"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)


def loss_and_gradient(z, t, y, mask, **options):
    z = z.clone().requires_grad_()
    loss = pile_fast.pile_loss(z, t, y, mask=mask, **options)
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    loss.backward(upstream)
    return loss.detach(), z.grad


@PROPERTY
@given(
    options=st.fixed_dictionaries(LOSS_OPTIONS),
    batch=st.fixed_dictionaries({**BATCHES, "spread": st.sampled_from([0.1, 1.0, 5.0, 20.0, 100.0])}),
)
def test_loss_float32(how, options, batch):
    z, t, y, mask = make(**batch)
    want, want_gradient = loss_and_gradient(z.double(), t.double(), y, mask, backend="torch", **options)
    same, same_gradient = loss_and_gradient(z, t, y, mask, backend="torch", **options)
    got, gradient = loss_and_gradient(z, t, y, mask, **how, **options)
    assert gradient.dtype == torch.float32
    close(got, same, want, 2e-6 * max(1.0, want.abs().max().item() if want.numel() else 0.0))
    # Not below float32's normal numbers: e^-87 stands for anything smaller.
    close(gradient, same_gradient, want_gradient, 1e-5 * (want_gradient.abs().max().item() if z.numel() else 0.0) + 1e-37)


@PROPERTY
@given(options=st.fixed_dictionaries(LOSS_OPTIONS), batch=st.fixed_dictionaries(BATCHES))
def test_loss_float64(how, options, batch):
    z, t, y, mask = make(dtype=torch.float64, **batch)
    want = loss_and_gradient(z, t, y, mask, backend="torch", **options)
    got = loss_and_gradient(z, t, y, mask, **how, **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [5, 40, 300])
def test_half_inputs_are_read_as_such_and_computed_in_float32(how, dtype, n):
    z, t, y, mask = make(n, missing=0.2, masked=0.2, dtype=dtype)
    want = pile_fast.pile_ensemble(t.double(), y, mask=mask, backend="torch").logits
    got = pile_fast.pile_ensemble(t, y, mask=mask, **how).logits
    assert got.dtype == torch.float32
    close(got, want, want, 2e-6 * scale_of(t))
    want_loss, want_gradient = loss_and_gradient(z.double(), t.double(), y, mask, backend="torch", alpha=0.5)
    loss, gradient = loss_and_gradient(z, t, y, mask, alpha=0.5, **how)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    close(loss, want_loss, want_loss, 2e-6)
    # The gradient is rounded once to the student's dtype, and once more by its product with the upstream gradient.
    assert (gradient.double() - want_gradient).abs().max() <= 2 * torch.finfo(dtype).eps * want_gradient.abs().max()


@pytest.mark.parametrize("labels", ["grades", "continuous"])
@pytest.mark.parametrize("granularity", ["document", "query"])
@pytest.mark.parametrize("n", [5000, 9001])  # longer than what one thread takes alone, and than one block of direct sums
def test_long_lists(how, labels, granularity, n):
    if how["backend"] == "torch":
        pytest.skip("the reference against itself, at n x n memory")
    z, t, y, _ = make(n, queries=1, labels=labels, missing=0.1, unlabelled=0.1)
    exact = dict(backend="cpp", pairwise="direct")
    want = pile_fast.pile_ensemble(t.double(), y, granularity=granularity, **exact).logits
    got = pile_fast.pile_ensemble(t, y, granularity=granularity, **how).logits
    close(got, want, want, 2e-6 * scale_of(t))
    want_loss, want_gradient = loss_and_gradient(z.double(), t.double(), y, None, alpha=0.5, granularity=granularity, **exact)
    loss, gradient = loss_and_gradient(z, t, y, None, alpha=0.5, granularity=granularity, **how)
    close(loss, want_loss, want_loss, 2e-6)
    close(gradient, want_gradient, want_gradient, 1e-5 * want_gradient.abs().max().item())


def test_direct_sum_in_double_equals_the_reference_on_a_list_that_teams_share(how):
    z, t, y, _ = make(2500, queries=1, labels="continuous", dtype=torch.float64)
    got = loss_and_gradient(z, t, y, None, alpha=0.5, iterations=2, **how)
    want = loss_and_gradient(z, t, y, None, alpha=0.5, iterations=2, backend="torch")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("normalize", ["zscore", "none"])
def test_huge_logits_stay_finite_and_in_range(how, size, normalize):
    z, t, y, _ = make(60, spread=size)
    ensemble = pile_fast.pile_ensemble(t, y, normalize=normalize, **how)
    assert ensemble.logits.isfinite().all()
    loss, gradient = loss_and_gradient(z, t, y, None, normalize=normalize, alpha=0.5, **how)
    want, want_gradient = loss_and_gradient(z.double(), t.double(), y, None, normalize=normalize, alpha=0.5, backend="torch")
    assert loss.isfinite() and gradient.isfinite().all()
    if normalize == "zscore":
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
        assert (gradient.double() - want_gradient).abs().max() <= 1e-5 * want_gradient.abs().max()


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float64, torch.bfloat16]
)
def test_labels_of_any_real_dtype(how, dtype):
    z, t, y, _ = make(30)
    y = (y > 2) if dtype is torch.bool else y
    got = pile_fast.pile_loss(z, t, y.to(dtype), alpha=0.5, pair_weight="label_gap", **how)
    want = pile_fast.pile_loss(z, t, y.float(), alpha=0.5, pair_weight="label_gap", backend="torch")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_labels_that_only_float64_tells_apart(how):
    t = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    y = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    logits = pile_fast.pile_ensemble(t, y, **how).logits
    assert logits[0, 1] > logits[0, 0]


def test_mixed_dtypes_compute_in_the_widest(how):
    z, t, y, _ = make(20)
    loss = pile_fast.pile_loss(z.double(), t, y, **how)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, pile_fast.pile_loss(z.double(), t.double(), y, backend="torch"), rtol=1e-9, atol=0)


def test_strides_do_not_matter(how):
    z, t, y, mask = make(37, missing=0.2, masked=0.2)
    strange = (
        z.t().contiguous().t(),
        t.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        torch.stack([y, y], -1)[..., 0],
        mask.repeat_interleave(2, 1)[:, ::2],
    )
    assert not any(x.is_contiguous() for x in strange)
    for a, b in zip(
        loss_and_gradient(*strange, alpha=0.5, **how), loss_and_gradient(z, t, y, mask, alpha=0.5, **how), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    expanded = pile_fast.pile_ensemble(t[:, :, :1].expand(-1, -1, 3), y, **how).logits
    torch.testing.assert_close(expanded, pile_fast.pile_ensemble(t[:, :, :1], y, **how).logits, equal_nan=True)
