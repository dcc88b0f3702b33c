"""The teacher that agrees best with the labels."""

import torch
from torch import Tensor

from pile_fast.checks import choice, number
from pile_fast.ensembles.base import Ensemble, Teachers, label_losses


def best_teacher_ensemble(
    teacher_logits: Tensor, labels: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None,
    normalize: str = "zscore", selection: str = "global", temperature: float = 1.0,
) -> Ensemble:  # fmt: skip
    r"""The teacher that agrees best with the labels.

    .. math:: m^* = \arg\min_m \ell_{qm} \ \text{or}\ \arg\min_m \sum_q \ell_{qm}, \qquad
              \ell_{qm} = \frac{1}{|P_q|} \sum_{(i,j) \in P_q} \log(1 + \exp(-(\tilde t_{im} - \tilde t_{jm}) / \tau))

    P_q are the labelled pairs y_i > y_j that teacher m scored; without any, ℓ_qm = log 2, the loss of a constant.
    Equally good teachers share the weight. A document that the best teacher did not score takes the best of those
    that did.

    Args:
        teacher_logits, mask, cu_seqlens, normalize: see `mean_ensemble`.
        labels: (Q, N) or (D,), any real dtype, larger is better; NaN = unlabelled.
        selection: "global", one teacher for all queries of the call (the only ensemble here whose result for a query
            depends on the others), or "query", an oracle that chooses for each query.
        temperature: τ, the unit of the calibrated logits, > 0.

    Returns:
        Ensemble(logits, weights), weights (M,) for "global", (Q, M) for "query".

    >>> import torch
    >>> from pile_fast.ensembles import best_teacher_ensemble
    >>> teachers = torch.tensor([[[2.0, 0.0], [1.0, 2.0], [0.0, 1.0]]])  # the first teacher is right
    >>> best_teacher_ensemble(teachers, torch.tensor([[2, 1, 0]])).weights
    tensor([1., 0.])
    """
    choice("selection", selection, ("global", "query"))
    temperature = number("temperature", temperature, low=0.0, open_low=True)
    teachers = Teachers(teacher_logits, labels, mask, cu_seqlens, normalize, needs="labels")
    loss, here = label_losses(teachers, temperature), teachers.here
    if selection == "global":
        loss, here = loss.sum(0), here.any(0)
    best = _lowest(loss, here)
    per_document = loss.unsqueeze(-2).expand(teachers.present.shape)
    return Ensemble(teachers.combine(_lowest(per_document, teachers.present)), best)


def _lowest(loss: Tensor, present: Tensor) -> Tensor:
    """Weight 1 on the present teacher of the lowest loss, shared among equals."""
    loss = torch.where(present, loss, torch.inf)
    # Equal to rounding: of two documents, every calibrated teacher that orders them in one way says the same.
    lowest = (present & (loss <= loss.amin(-1, keepdim=True) * (1 + 1e-5))).to(loss.dtype)
    return lowest / lowest.sum(-1, keepdim=True).clamp(min=1)
