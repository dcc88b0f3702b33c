"""PILE as a loss function of Lightning-IR."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import pile_fast
from pile_fast.integrations import import_library

losses = import_library("lightning_ir.loss", "lightning-ir")


class PILELoss(losses.ScoringLossFunction):
    """Distil several teachers into a Lightning-IR model: one of the module's ``loss_functions``.

    The targets of a batch (B, N, K) carry a column of labels and K − 1 of teachers' logits. Lightning-IR's own losses see the
    maximum of such columns; this one takes them apart. `RunDataset(..., targets="score")` makes them of all columns of the run
    file whose name contains "score", in the file's order: name the first ``label_score``, the others ``bm25_score`` and so on.

    Args:
        label_column: which target column holds the labels (NaN = unlabelled); the others are teachers.
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
        self, label_column: int = 0, missing_value: float | None = None, prior: Sequence[float] | None = None, **options
    ):
        super().__init__()
        if options.get("reduction") == "none":
            raise ValueError("reduction: expected 'mean' or 'sum', got 'none'; the trainer wants one number")
        self.label_column = label_column
        self.missing_value = missing_value
        prior = None if prior is None else torch.as_tensor(prior, dtype=torch.float32)
        self.loss = pile_fast.PILELoss(prior=prior, **options)

    def compute_loss(self, output, batch) -> Tensor:
        """The loss () of the model's scores (B, N) against the targets (B, N, K)."""
        scores, targets = self.process_scores(output), batch.targets
        if targets is None:
            raise ValueError("targets: expected labels and teachers' logits in the batch, got none")
        columns = targets.numel() // max(1, scores.numel())
        if columns < 2 or targets.numel() != columns * scores.numel():
            wanted = ", ".join(map(str, scores.shape))
            raise ValueError(f"targets: expected ({wanted}, K), labels and K - 1 teachers, K > 1; got {tuple(targets.shape)}")
        if not -columns <= self.label_column < columns:
            raise ValueError(f"label_column: expected one of {columns} target columns, got {self.label_column}")
        targets = targets.view(*scores.shape, columns).to(scores.device)  # in validation Lightning-IR leaves them flat
        at = self.label_column % columns
        labels = targets[..., at]
        teachers = torch.cat([targets[..., :at], targets[..., at + 1 :]], -1).float()
        if self.missing_value is not None:
            teachers = teachers.masked_fill(teachers == self.missing_value, torch.nan)
        return self.loss.to(scores.device)(scores, teachers, labels)
