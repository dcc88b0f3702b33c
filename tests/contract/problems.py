"""Random batches, the losses under test, and what "equal" means."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pile_fast
from pile_fast import terms
from pile_fast.terms import Term

INF, NAN = float("inf"), float("nan")
Options = dict[str, Any]
# (offset, scale) of the teachers: offsets up to 1e7 times the spread, scales over most of float32.
SCALES = [(0.0, 1e-30), (0.0, 1e-25), (1e-3, 1e-10), (0.0, 1.0), (1e6, 1.0), (-1e7, 1.0), (0.0, 1e30), (1e30, 1e25)]


# -- batches


def batch(q: int = 3, n: int = 21, m: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teachers, labels."""
    return torch.randn(q, n), torch.randn(q, n, m), torch.randint(0, 4, (q, n))


def make(
    n: int,
    queries: int = 2,
    teachers: int = 3,
    *,
    spread: float = 1.0,
    labels: str = "grades",
    missing: float = 0.0,
    unlabelled: float = 0.0,
    masked: float = 0.0,
    packed: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Options]:
    """Student, teachers, labels and where the documents are (`mask`, `cu_seqlens` or neither), all in `dtype` but the labels.

    A packed batch holds the documents that a mask would have left, and three of no query behind them.
    """
    g = torch.Generator(torch.empty(0).device).manual_seed(seed)
    truth = torch.randn(queries, n, 1, generator=g)
    t = spread * (truth + torch.randn(queries, n, teachers, generator=g)) + torch.randn(teachers, generator=g)
    t[torch.rand(t.shape, generator=g) < missing] = NAN
    y = truth[..., 0] + 0.5 * torch.randn(queries, n, generator=g)
    y = (y * 1.5 + 2).round().clamp(0, 4) if labels == "grades" else y.abs()  # as gains none is negative
    y[torch.rand(y.shape, generator=g) < unlabelled] = NAN
    z = spread * torch.randn(queries, n, generator=g)
    mask = torch.rand(queries, n, generator=g) >= masked
    z, t = z.to(dtype), t.to(dtype)
    if packed:
        z, t, y = (torch.cat([x[mask], torch.full((3, *x.shape[2:]), 5, dtype=x.dtype)]) for x in (z, t, y))
        return z, t, y, dict(cu_seqlens=torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)))
    return z, t, y, dict(mask=mask) if masked else {}


def covering(axes: dict[str, Sequence], count: int) -> list[Options]:
    """`count` random choices, the same every time, in which each value of an axis comes up as often as any other."""
    shuffled = random.Random(0)
    columns = [[values[i % len(values)] for i in range(count)] for values in axes.values()]
    for column in columns:
        shuffled.shuffle(column)
    return [dict(zip(axes, row, strict=True)) for row in zip(*columns, strict=True)]


# -- the losses


# Every term with its defaults, and here with other numbers.
NUMBERS: dict[str, list[Options]] = {
    "distill_logistic": [dict(temperature=0.5), dict(temperature=3.0)],
    "distill_kl": [dict(temperature=2.5)],
    "label_softmax": [dict(temperature=0.5, gain="exp2")],
    "label_lambdarank": [dict(cutoff=3), dict(metric="mrr", cutoff=10), dict(gain="linear")],
    "label_approx_ndcg": [dict(temperature=1.0, gain="linear")],
}


def terms_of(kind: str) -> list[Term]:
    """A kind's terms: with its defaults each, then those with numbers of their own."""
    defaults = [terms.find(kind, "kind", name) for name in terms.names(kind)]
    return defaults + [type(term)(**numbers) for term in defaults for numbers in NUMBERS.get(term.key, [])]


class Loss(NamedTuple):
    """A loss as the tests call it: (student, teachers, labels, **options), a distillation's target being the first teacher."""

    name: str
    call: Callable[..., Tensor]
    term: Term | None = None  # None: both
    repeats: bool = False  # left out where calls are dear: it differs from another in its options alone

    @property
    def by_label(self) -> bool:
        return self.term is not None and self.term.kind == "label"


def losses(iterations: int) -> list[Loss]:
    """Each term alone, then both in one call, at so many iterations."""
    rows = []
    for term in terms_of("distill"):
        alone = functools.partial(pile_fast.distillation_loss, kind=term)
        rows.append(Loss(f"distill-{term}", lambda z, t, y, alone=alone, **kw: alone(z, t[..., 0], **kw), term))
    for term in terms_of("label"):
        for weight in ("label_gap", None) if isinstance(term, terms.RankNet) else (None,):
            alone = functools.partial(pile_fast.ranking_loss, kind=term, pair_weight=weight)
            name = f"label-{term}" + (f"-{weight}" if isinstance(term, terms.RankNet) else "")
            repeats = weight is None and isinstance(term, terms.RankNet)
            rows.append(Loss(name, lambda z, t, y, alone=alone, **kw: alone(z, y, **kw), term, repeats))
    both = functools.partial(pile_fast.pile_loss, alpha=0.5, iterations=iterations)
    rows.append(Loss("pile", functools.partial(both, granularity="document"), repeats=True))
    rows.append(Loss("pile-query", functools.partial(both, granularity="query", pair_weight="gain_gap")))
    rows.append(Loss("pile-shared", _with_weights, repeats=True))
    # Where calls are dear, a term with its defaults says enough.
    return [row._replace(repeats=row.repeats or row.term not in (None, type(row.term)())) for row in rows]


def _with_weights(z: Tensor, t: Tensor, y: Tensor, **options: Any) -> Tensor:
    """With weights that all queries share, which were fitted elsewhere."""
    prior = torch.arange(1, t.shape[-1] + 1, dtype=torch.float32, device=t.device)
    return pile_fast.pile_loss(z, t, y, **dict(alpha=0.5, granularity="shared", iterations=0, prior=prior) | options)


def run(loss: Callable[..., Tensor], z: Tensor, t: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Value and gradient. The upstream gradient of several values differs from one to the next."""
    z = z.detach().clone().requires_grad_()
    value = loss(z, t, y, **options)
    upstream = torch.linspace(0.5, 2, value.numel(), dtype=value.dtype, device=value.device).view(value.shape)
    (gradient,) = torch.autograd.grad(value, z, upstream)
    return value.detach(), gradient


# -- what equal means


def same(a: Tensor, b: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(a, b, **({"rtol": 2e-5, "atol": 2e-6, "equal_nan": True} | tolerance))


def largest(x: Tensor) -> float:
    return x.double().nan_to_num(0, 0, 0).abs().max().item() if x.numel() else 0.0


def close(got: Tensor, own: Tensor, reference: Tensor, bound: float) -> None:
    """`got` within `bound` of the float64 `reference`, or within three times the error of `own`, the reference in this dtype.

    After flash-attention's tests: sharp settings (raw logits, low temperature, many steps) amplify rounding in any
    implementation.
    """
    assert (got.isnan() == reference.isnan()).all()
    error, allowed = largest(got.double() - reference), max(bound, 3 * largest(own.double() - reference))
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}, bound {bound:.3g}"


def relative_error(got: Tensor, reference: Tensor) -> float:
    """The largest error against the largest value."""
    assert (got.isnan() == reference.isnan()).all()
    return largest(got.double() - reference) / max(largest(reference), 1e-300)


def scale_of(t: Tensor) -> float:
    """The largest calibrated logit, about: the contract's unit."""
    return max(largest(t), 1.0)


# -- the contract


def check_ensemble(t: Tensor, y: Tensor, how: Options, exact: Options | None = None, **options: Any) -> None:
    """Every output against the float64 reference (`exact` says who computes it)."""
    options = dict(return_weights=True, return_trace=True) | options
    exact = exact or dict(backend="torch")
    want = pile_fast.pile_ensemble(t.double(), y, **exact, **options)
    own = pile_fast.pile_ensemble(t, y, **exact, **options)
    got = pile_fast.pile_ensemble(t, y, **how, **options)
    bound = (1e-9 if t.dtype is torch.float64 else 2e-6) * scale_of(t)
    for name, factor in (("logits", 1), ("weights", 1), ("trace", 2)):
        a, b, c = (getattr(result, name) for result in (got, own, want))
        if a is not None:
            assert a.dtype == (t.dtype if t.dtype is torch.float64 else torch.float32)
            close(a, b, c, factor * bound)


def check_loss(
    loss: Callable[..., Tensor], z: Tensor, t: Tensor, y: Tensor, how: Options, exact: Options | None = None, **options: Any
) -> None:
    """Value and gradient against the float64 reference (`exact` says who computes it)."""
    exact = exact or dict(backend="torch")
    want, want_gradient = run(loss, z.double(), t.double(), y, **exact, **options)
    own, own_gradient = run(loss, z, t, y, **exact, **options)
    got, gradient = run(loss, z, t, y, **how, **options)
    wide = z.dtype is torch.float64
    assert got.dtype == (z.dtype if wide else torch.float32) and gradient.dtype == z.dtype
    close(got, own, want, (1e-9 if wide else 2e-6) * max(1.0, largest(want)))
    # A half gradient is rounded once, and once more by its product with the upstream gradient.
    relative = {torch.float64: 1e-8, torch.float32: 1e-5}.get(z.dtype, 2 * torch.finfo(z.dtype).eps)
    # Not below float32's normal numbers: e^-87 stands for anything smaller.
    close(gradient, own_gradient, want_gradient, relative * largest(want_gradient) + 1e-37)


def capture(call: Callable[[], Any]) -> Callable[[], Any]:
    """A function that replays `call` as a CUDA graph and returns what it returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Any:
        graph.replay()
        return out

    return replay
