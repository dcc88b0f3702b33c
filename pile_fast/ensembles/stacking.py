"""Global weights learnt from labels by logistic regression."""

from __future__ import annotations

import torch
from torch import Tensor

from pile_fast.checks import number
from pile_fast.ensembles.base import Ensemble, Teachers, check_normalize
from pile_fast.extras import needs_extra


class StackingEnsemble:
    r"""Global weights learnt from labels: logistic regression on the pairs' differences of calibrated teacher logits.

    .. math:: \min_w \sum_q \frac{1}{|P_q|} \sum_{(i,j) \in P_q} \log(1 + \exp(-w^\top (\tilde t_i - \tilde t_j)))
              + \frac{\|w\|^2}{2C}

    over the labelled pairs y_i > y_j, each query counting the same. The weights are free, of either sign and any
    scale (this is stacking, not a convex combination), so the logits are on the scale of the labels' log odds. A
    teacher missing at a document of a pair adds 0 to the pair's difference; at a document the weights of its teachers
    are scaled up to the absolute sum of all of them. Fit on other queries than those whose students are judged:
    labels go into the targets. Needs scikit-learn.

    Args:
        normalize: calibration per query and teacher: "zscore", "center" or "none".
        C: inverse strength of the L2 penalty, > 0.
        pairs_per_query: of a query with more pairs than this, so many spread ones are used, always the same.

    Attributes:
        weights: (M,) float64 tensor, None before `fit`.

    >>> import torch
    >>> from pile_fast.ensembles import StackingEnsemble
    >>> teachers = torch.tensor([[[2.0, 0.0], [1.0, 2.0], [0.0, 1.0]]])  # the first teacher is right
    >>> stacking = StackingEnsemble().fit(teachers, torch.tensor([[2, 1, 0]]))
    >>> stacking(teachers).logits.argsort(descending=True)
    tensor([[0, 1, 2]])
    """

    def __init__(self, *, normalize: str = "zscore", C: float = 1.0, pairs_per_query: int = 200):
        check_normalize("normalize", normalize)
        if isinstance(pairs_per_query, bool) or not isinstance(pairs_per_query, int) or pairs_per_query < 1:
            raise ValueError(f"pairs_per_query: expected an int >= 1, got {pairs_per_query!r}")
        self.normalize = normalize
        self.C = number("C", C, low=0.0, open_low=True)
        self.pairs_per_query = pairs_per_query
        self.weights: Tensor | None = None

    def fit(
        self, teacher_logits: Tensor, labels: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> StackingEnsemble:
        """Learn the weights, equal ones without any pair. For the arguments see `best_teacher_ensemble`.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
            ImportError: scikit-learn is not installed.
        """
        with needs_extra("ensembles"):
            from sklearn.linear_model import LogisticRegression
        teachers = Teachers(teacher_logits, labels, mask, cu_seqlens, self.normalize, needs="labels")
        labelled = teachers.scored & teachers.labels.isfinite()
        query, above, below, weight = _some_pairs(teachers.labels, labelled, self.pairs_per_query)
        if query.shape[0] == 0:
            self.weights = torch.full((teachers.here.shape[1],), 1 / teachers.here.shape[1], dtype=torch.float64)
            return self
        t, present = teachers.logits.double(), teachers.present
        both = present[query, above] & present[query, below]
        difference = torch.where(both, t[query, above] - t[query, below], 0.0)
        # The regression wants two classes, so every pair is told from both sides.
        model = LogisticRegression(C=self.C, fit_intercept=False, tol=1e-8, max_iter=1000)
        model.fit(
            torch.cat([-difference, difference]).cpu().numpy(),
            torch.arange(2).repeat_interleave(query.shape[0]).numpy(),
            sample_weight=(weight / 2).repeat(2).cpu().numpy(),
        )
        self.weights = torch.from_numpy(model.coef_[0])
        return self

    def __call__(
        self, teacher_logits: Tensor, labels: Tensor | None = None, *, mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Ensemble:  # fmt: skip
        """Ensemble(logits, weights), weights (M,); see `mean_ensemble` for the arguments.

        Raises:
            RuntimeError: not fitted.
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        if self.weights is None:
            raise RuntimeError("StackingEnsemble: call fit(teacher_logits, labels) first")
        teachers = Teachers(teacher_logits, labels, mask, cu_seqlens, self.normalize)
        count = teachers.here.shape[1]
        if count != self.weights.shape[0]:
            raise ValueError(f"teacher_logits: expected {self.weights.shape[0]} teachers as in fit, got {count}")
        weights = self.weights.to(teachers.logits)
        return Ensemble(teachers.combine(weights) * weights.abs().sum(), weights)


def _some_pairs(labels: Tensor, labelled: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each query at most `most` pairs: (pairs,) query, document above, document below, 1 / pairs of the query.

    Pairs are numbered, not listed: the documents in falling order of labels, each with those of lower labels.
    """
    key, order = torch.where(labelled, -labels.double(), torch.inf).sort(dim=1, stable=True)
    size = labelled.sum(1, keepdim=True)
    lower = (size - torch.searchsorted(key, key, right=True)).clamp(min=0)
    last = lower.cumsum(1)  # pairs up to and with the document
    total = lower.sum(1, keepdim=True)
    number = torch.arange(most, device=labels.device)
    # One pair from each of `most` equal shares, at random places: even steps would meet the same documents every time.
    place = torch.rand(most, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(labels.device)
    spread = ((number + place) * (total.double() / most)).long().minimum(total - 1)
    number = torch.where(total <= most, number, spread)
    above = torch.searchsorted(last, number, right=True)
    query, column = (number < total).nonzero(as_tuple=True)
    number, above = number[query, column], above[query, column]
    below = size[query, 0] - last[query, above] + number
    return query, order[query, above], order[query, below], 1 / total.clamp(max=most)[query, 0].double()
