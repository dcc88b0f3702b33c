"""What the ensembles share: their result, the checked and calibrated teachers, and what labels say of a teacher."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pile_fast.batch import PaddedView, RankingBatch, compute_dtype
from pile_fast.functional import ranking_loss
from pile_fast.options import EnsembleOptions, table
from pile_fast.reference import calibrate, present_teachers

check_normalize = table(EnsembleOptions)["normalize"].check
# A backend that forms pairs explicitly needs memory for this many at once.
PAIRS_AT_ONCE = 2**24


class Ensemble(NamedTuple):
    """What an ensemble returns.

    Attributes:
        logits: (Q, N) or (D,), float32 (float64 for float64 teachers); NaN where no teacher scored the document and in
            slots without a document.
        weights: the teachers' weights before they are rescaled to the teachers of a document: (M,), (Q, M) or, where
            every document has its own, (Q, N, M) / (D, M). Each row on the simplex (0 throughout where no teacher
            is); those of `StackingEnsemble` are free.
    """

    logits: Tensor
    weights: Tensor


class Teachers:
    """Checked and calibrated teachers of one call as (Q, N, M), and the way back to the caller's layout."""

    def __init__(
        self, teacher_logits: Tensor, labels: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None, normalize: str,
        *, prior: Tensor | None = None, student_logits: Tensor | None = None, needs: str = "",
    ) -> None:  # fmt: skip
        check_normalize("normalize", normalize)
        given = {"student_logits": student_logits, "teacher_logits": teacher_logits, "labels": labels}
        for name in ("teacher_logits", needs):
            if name and given[name] is None:
                raise TypeError(f"{name}: expected a torch.Tensor, got None")
        batch = RankingBatch(**given, mask=mask, cu_seqlens=cu_seqlens, prior=prior)
        self.view = PaddedView(batch)
        self.normalize = normalize
        dtype = compute_dtype(teacher_logits)
        self.raw = self.view.pad(teacher_logits).to(dtype)
        self.labels: Any = self.view.labels(batch)  # these two None if not given, and not called for by `needs`
        self.student: Any = None if student_logits is None else self.view.pad(student_logits.detach()).to(dtype)
        self.present = present_teachers(self.raw, self.view.valid, prior)
        self.logits = calibrate(self.raw, self.present, normalize)
        self.scored = self.present.any(2)  # (Q, N)
        self.here = self.present.any(1)  # (Q, M): the teacher scored some document of the query
        self.count = self.here.sum(1, keepdim=True)
        base = self.here.to(dtype) if prior is None else torch.where(self.here, prior.to(dtype), 0.0)
        self.base = base / base.sum(1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)  # the weights of the mean

    def calibrate_list(self, logits: Tensor) -> Tensor:
        """One more (Q, N) set of logits, calibrated like a teacher."""
        return calibrate(logits.unsqueeze(-1), self.scored.unsqueeze(-1), self.normalize).squeeze(-1)

    def combine(self, weights: Tensor) -> Tensor:
        """Ensemble logits from weights (M,), (Q, M) or (Q, N, M)."""
        weights = weights if weights.dim() == 3 else weights.unsqueeze(-2)
        local = torch.where(self.present, weights, 0.0)
        # Weights that are 0 but for rounding would, rescaled, choose a teacher at random.
        held = local.abs().sum(-1, keepdim=True) > 1e-5 * weights.abs().sum(-1, keepdim=True)
        local = torch.where(held, local, self.present.to(local.dtype))
        return self.unpad((local * self.logits).sum(-1) / local.abs().sum(-1))

    def unpad(self, logits: Tensor) -> Tensor:
        return self.view.unpad(torch.where(self.scored, logits, torch.nan), torch.nan)


def label_losses(teachers: Teachers, temperature: float) -> Tensor:
    """(Q, M) ℓ_qm, the pairwise logistic loss of each teacher on its own; log 2 without a pair."""
    queries, documents, count = teachers.logits.shape
    if documents == 0:
        return teachers.logits.new_full((queries, count), math.log(2))
    # Each teacher of each query as a query of its own.
    t = (teachers.logits / temperature).transpose(1, 2).flatten(0, 1)
    present = teachers.present.transpose(1, 2).flatten(0, 1)
    labels = teachers.labels.repeat_interleave(count, 0)
    rows = max(1, PAIRS_AT_ONCE // documents**2)
    chunks = zip(t.split(rows), labels.split(rows), present.split(rows), strict=True)
    loss = torch.cat([ranking_loss(s, y, mask=valid, reduction="none") for s, y, valid in chunks])
    labelled, y = present & labels.isfinite(), labels.double()
    highest = torch.where(labelled, y, -torch.inf).amax(1)
    lowest = torch.where(labelled, y, torch.inf).amin(1)
    return torch.where(highest > lowest, loss, math.log(2)).view(queries, count)


def complement(share: Tensor, teachers: Teachers) -> Tensor:
    """Weights (1 − share_m) / (K − 1) of a query's K teachers, from shares on the simplex; 1 for a teacher alone."""
    return torch.where(teachers.here & (teachers.count > 1), (1 - share) / (teachers.count - 1), teachers.base)
