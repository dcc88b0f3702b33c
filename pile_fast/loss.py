"""`PILELoss`: the loss as a module that keeps its options."""

from __future__ import annotations

import torch
from torch import Tensor

from pile_fast.backends import check_name
from pile_fast.functional import pile_loss
from pile_fast.options import ensemble_options, loss_options


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

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        distillation: str = "logistic",
        distillation_temperature: float = 1.0,
        reduction: str = "mean",
        iterations: int = 10,
        step_size: float | None = None,
        granularity: str = "document",
        normalize: str = "zscore",
        temperature: float = 1.0,
        margin: float = 0.0,
        pair_weight: str | None = None,
        prior: Tensor | None = None,
        pairwise: str = "auto",
        backend: str = "auto",
    ):
        super().__init__()
        ensemble_options(iterations, step_size, granularity, normalize, temperature, margin, pair_weight, pairwise)
        loss_options(alpha, distillation, distillation_temperature, pair_weight, reduction, pairwise)
        check_name(backend)
        self.register_buffer("prior", prior)
        self.options = dict(
            alpha=alpha, distillation=distillation, distillation_temperature=distillation_temperature, reduction=reduction,
            iterations=iterations, step_size=step_size, granularity=granularity, normalize=normalize,
            temperature=temperature, margin=margin, pair_weight=pair_weight, pairwise=pairwise, backend=backend,
        )  # fmt: skip

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
            student_logits, teacher_logits, labels, mask=mask, cu_seqlens=cu_seqlens, prior=self.prior, **self.options
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
