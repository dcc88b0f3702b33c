"""`PILELoss`: the loss as a module that keeps its options."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from pile_fast.backends import check_name
from pile_fast.functional import pile_loss
from pile_fast.options import EnsembleOptions, LossOptions, PILEKeywords, documented, pile_options, table


class PILELoss(torch.nn.Module):
    r"""PILE as a drop-in loss: ensemble the teachers under label supervision, distil the ensemble into the student.

    A module around `pile_fast.pile_loss`: same options, same defaults, checked when the module is built. `prior` (M,) is kept
    as a buffer and follows the module to its device.

    Call it with ``(student_logits, teacher_logits, labels, mask=None, cu_seqlens=None)``, student first; shapes, results and
    errors are those of `pile_fast.pile_loss`.

    >>> import torch, pile_fast
    >>> loss_fn = pile_fast.PILELoss(alpha=0.7, granularity="query")
    >>> student = torch.randn(2, 5, requires_grad=True)
    >>> loss = loss_fn(student, torch.randn(2, 5, 3), torch.randint(0, 3, (2, 5)))
    >>> loss.backward()
    """

    prior: Tensor | None

    @documented(LossOptions, EnsembleOptions)
    def __init__(self, *, prior: Tensor | None = None, backend: str = "auto", **options: Unpack[PILEKeywords]) -> None:
        super().__init__()
        pile_options(**options)
        self.register_buffer("prior", prior)
        self._given = options
        self._backend = check_name(backend)

    @property
    def options(self) -> dict[str, Any]:
        """A copy of all options, given or not."""
        defaults = {name: row.default for name, row in table(LossOptions, EnsembleOptions).items()}
        return {**defaults, **self._given, "backend": self._backend}

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        num_items_in_batch: object | None = None,
    ) -> Tensor:
        if num_items_in_batch is not None or isinstance(teacher_logits, dict):  # whoever calls it is a transformers.Trainer
            raise TypeError(
                "PILELoss: expected tensors; the compute_loss_func of a Trainer is made by "
                "pile_fast.trainer.pile_compute_loss_func(...), which takes the same options"
            )
        if isinstance(student_logits, (list, tuple)):  # a trainer of sentence-transformers, with its columns
            raise TypeError(
                f"student_logits: expected a torch.Tensor, got {type(student_logits).__name__}; for sentence-transformers' "
                "trainers pile_fast.integrations.sentence_transformers has PILELoss(model, ...) and "
                "BiEncoderPILELoss(model, ...)"
            )
        return pile_loss(
            student_logits, teacher_logits, labels,  # type: ignore[arg-type]  # None: it says what is missing
            mask=mask, cu_seqlens=cu_seqlens, prior=self.prior, backend=self._backend, **self._given,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
