"""Reciprocal rank fusion."""

import torch
from torch import Tensor

from pile_fast.checks import number
from pile_fast.ensembles.base import Ensemble, Teachers


def rrf_ensemble(
    teacher_logits: Tensor, labels: Tensor | None = None, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None,
    normalize: str = "zscore", prior: Tensor | None = None, k: float = 60.0,
) -> Ensemble:  # fmt: skip
    r"""Reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009).

    .. math:: s_i = \sum_m \frac{1}{k + \text{rank}_m(i)}

    is the paper's, and the result of ``normalize="none"``. Ours: as ranks need no calibration, `normalize` is applied
    to s, whose differences of a hundredth or so are no logits to distil; equal logits share their mean rank; a
    missing teacher is not a bad rank, the sum is scaled up from the teachers that scored the document; `prior`
    weights the terms.

    Args:
        teacher_logits, labels, mask, cu_seqlens, prior: see `mean_ensemble`.
        normalize: calibration of the fused scores per query: "zscore", "center" or "none".
        k: >= 0; the larger, the less the top ranks stand out.

    Returns:
        Ensemble(logits, weights), weights (Q, M).

    >>> import torch
    >>> from pile_fast.ensembles import rrf_ensemble
    >>> teachers = torch.tensor([[[9.0, 0.2], [1.0, 0.1], [0.0, 0.3]]])
    >>> rrf_ensemble(teachers, normalize="none", k=1).logits.mul(60).round()  # 1/2 + 1/3, 1/3 + 1/4, 1/4 + 1/2
    tensor([[50., 35., 45.]])
    """
    k = number("k", k, low=0.0)
    teachers = Teachers(teacher_logits, labels, mask, cu_seqlens, normalize, prior=prior)
    keys = torch.where(teachers.present, -teachers.raw, torch.inf).transpose(1, 2).contiguous()
    ascending = keys.sort(-1).values
    before, upto = torch.searchsorted(ascending, keys), torch.searchsorted(ascending, keys, right=True)
    rank = (before + upto + 1).transpose(1, 2).double() / 2
    weight = torch.where(teachers.present, teachers.base.unsqueeze(1), 0.0).double()
    s = (weight / (k + rank)).sum(-1) / weight.sum(-1) * teachers.count
    # Rounded, so that a list of equal sums stays equal and calibration does not blow up its rounding errors.
    s = teachers.calibrate_list(s.float().to(teachers.raw.dtype))
    return Ensemble(teachers.unpad(s), teachers.base)
