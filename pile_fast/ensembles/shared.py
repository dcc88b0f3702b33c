"""Teachers' weights that all queries share."""

import torch
from torch import Tensor

from pile_fast.batch import RankingBatch
from pile_fast.checks import count
from pile_fast.ensembles.pile import pile_with_weights


def shared_prior(
    teacher_logits: Tensor, labels: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None,
    iterations: int = 30, step_size: float = 3.0, normalize: str = "zscore", temperature: float = 1.0, margin: float = 0.0,
    pair_weight: str | None = None,
) -> Tensor:  # fmt: skip
    """Teachers' weights that all queries share, as the `prior` of `pile_ensemble` and `pile_loss`: ours, not a paper's.

    PILE's update with one weight vector for the whole data set: in each iteration the step that "query" granularity would
    take in every query, averaged over the queries in which the teacher scored a document. It learns which teachers to trust
    from all labels at once, where PILE alone has those of one query. Fit it on training queries.

    Args:
        teacher_logits: (Q, N, M) or (D, M) float; NaN = not scored.
        labels: (Q, N) or (D,), larger is better; NaN = unlabelled.
        mask, cu_seqlens: see `pile_fast.pile_ensemble`.
        iterations: steps, each a pass over the data.
        step_size, normalize, temperature, margin, pair_weight: see `pile_fast.pile_ensemble`.

    Returns:
        (M,) on the simplex. Queries without a labelled pair count with a step of 0.

    >>> import torch
    >>> from pile_fast.ensembles import shared_prior
    >>> labels = torch.tensor([[2, 1, 0], [0, 2, 1]])
    >>> teachers = torch.stack([labels.float(), -labels.float()], -1)  # one is right, one is wrong
    >>> shared_prior(teachers, labels)[0] > 0.9
    tensor(True)
    """
    batch = RankingBatch(teacher_logits=teacher_logits, labels=labels, mask=mask, cu_seqlens=cu_seqlens)
    weights = torch.full((batch.num_teachers,), 1 / max(batch.num_teachers, 1), device=batch.device)
    for _ in range(count("iterations", iterations)):
        each = pile_with_weights(
            teacher_logits, labels, mask=mask, cu_seqlens=cu_seqlens, granularity="query", iterations=1,
            step_size=step_size, normalize=normalize, temperature=temperature, margin=margin, pair_weight=pair_weight,
            prior=weights,
        ).weights  # fmt: skip
        change = torch.where(each > 0, (each / weights).log(), torch.nan).nanmean(0).nan_to_num()
        weights = torch.softmax(weights.log() + change, 0)
    return weights
