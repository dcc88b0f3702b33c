"""PILE as a loss function of Lightning-IR."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

import pile_fast
from pile_fast.extras import needs_extra

with needs_extra("lightning-ir"):
    from lightning_ir import loss as losses

logger = logging.getLogger(__name__)


class PILELoss(losses.ScoringLossFunction):
    """Distil several teachers into a Lightning-IR model: one of the module's ``loss_functions``.

    The targets of a batch (B, N, K) carry a column of labels and K − 1 of teachers' logits. Lightning-IR's own losses see the
    maximum of such columns; this one takes them apart. `RunDataset(..., targets="score")` makes them of all columns of the run
    file whose name contains "score", in the file's order: name the first ``label_score``, the others ``bm25_score`` and so on.

    Call `fit` with the training batches before training, so that the teachers' weights are learned from all of them at once.
    Without it each batch of training takes a step of the weights, and Lightning's checkpoints do not hold them.

    Args:
        label_column: which target column holds the labels (NaN = unlabelled); the others are teachers, of which there may be
            none at alpha = 0. None = all are teachers, for alpha = 1.
        missing_value: a teacher's logit that means "did not score this document", beside NaN. `RunDataset` fills holes in a
            column with 0: give 0.0 here if your run has holes and no teacher says exactly 0.
        prior: M weights to start from.
        options: those of `pile_fast.PILELoss`; `reduction` is "mean" or "sum".

    Raises:
        ValueError: the targets do not fit; the message says how.

    >>> loss = PILELoss(alpha=0.7)
    >>> module = CrossEncoderModule(model_name_or_path="...", loss_functions=[loss])  # doctest: +SKIP
    """

    def __init__(
        self,
        label_column: int | None = 0,
        missing_value: float | None = None,
        prior: Sequence[float] | None = None,
        **options: Any,
    ):
        super().__init__()
        if options.get("reduction") == "none":
            raise ValueError("reduction: expected 'mean' or 'sum', got 'none'; the trainer wants one number")
        self.label_column = label_column
        self.missing_value = missing_value
        start = None if prior is None else torch.as_tensor(prior, dtype=torch.float32)
        self.loss = pile_fast.PILELoss(prior=start, **options)
        if label_column is None and self.loss.options["alpha"] < 1:
            raise ValueError(f"label_column: expected a number at alpha={self.loss.options['alpha']:g}, got None")
        self._told_of_infinity = False

    def fit(self, batches: Iterable[Any]) -> Self:
        """Learn the teachers' weights that all queries share, before training; then they stay.

        Args:
            batches: of training, from a data loader: with `queries`, `docs` and `targets`, B queries of N documents each. In
                distributed training each process gives its share.

        Returns:
            The loss.

        Raises:
            ValueError: the targets do not fit.
            RuntimeError: the options have no weights that all queries share, see `pile_fast.PILELoss.fit`.
        """

        def targets() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in batches:
                if batch.targets is None:
                    raise ValueError("targets: expected labels and teachers' logits in the batch, got none")
                shape = (len(batch.queries), sum(map(len, batch.docs)) // max(1, len(batch.queries)))
                yield self._columns(batch.targets, torch.empty(shape, device=batch.targets.device))

        self.loss.fit(targets())
        return self

    def compute_loss(self, output: Any, batch: Any) -> Tensor:
        """The loss () of the model's scores (B, N) against the targets (B, N, K)."""
        scores, targets = self.process_scores(output), batch.targets
        if targets is None:
            raise ValueError("targets: expected labels and teachers' logits in the batch, got none")
        teachers, labels = self._columns(targets, scores)
        infinite = teachers.isinf()
        if not self._told_of_infinity and bool(infinite.any()):
            self._told_of_infinity = True
            query, _, teacher = infinite.nonzero()[0].tolist()
            name = query if batch.query_ids is None else repr(batch.query_ids[query])
            logger.warning("PILELoss: teacher %d gave an infinite logit for query %s; it counts as missing.", teacher + 1, name)
        # Lightning tells the model alone when it validates.
        loss = self.loss.to(scores.device).train(scores.requires_grad)
        return loss(scores, teachers.masked_fill(infinite, torch.nan), labels)

    def _columns(self, targets: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """(teachers (B, N, M), labels (B, N)) of targets for scores (B, N)."""
        columns = targets.numel() // max(1, scores.numel())
        least = 1 if self.label_column is None or self.loss.options["alpha"] == 0 else 2
        if columns < least or targets.numel() != columns * scores.numel():
            wanted = ", ".join(map(str, scores.shape))
            raise ValueError(
                f"targets: expected ({wanted}, K), labels and K - 1 teachers, K > 1; got {tuple(targets.shape)}; K = 1 needs "
                "alpha=0, or alpha=1 and label_column=None"
            )
        if self.label_column is not None and not -columns <= self.label_column < columns:
            raise ValueError(f"label_column: expected one of {columns} target columns, got {self.label_column}")
        targets = targets.view(*scores.shape, columns).to(scores.device)  # in validation Lightning-IR leaves them flat
        if self.label_column is None:
            labels, teachers = torch.full_like(scores, torch.nan, requires_grad=False), targets.float()
        else:
            at = self.label_column % columns
            labels = targets[..., at]
            teachers = torch.cat([targets[..., :at], targets[..., at + 1 :]], -1).float()
        if columns == 1 and self.label_column is not None:
            teachers = torch.full_like(targets, torch.nan, dtype=torch.float32)
        if self.missing_value is not None:
            teachers = teachers.masked_fill(teachers == self.missing_value, torch.nan)
        return teachers, labels
