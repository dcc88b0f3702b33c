"""`PileTrainer`: `transformers.Trainer` on packed queries. Everything the Trainer has is the Trainer's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import EvalPrediction, Trainer

from pile_fast.data.collator import pack_queries
from pile_fast.loss import PILELoss
from pile_fast.metrics import mrr, ndcg, pnr

# What a packed batch holds for the loss; the rest is the model's.
_TARGETS = ("teacher_logits", "labels", "cu_seqlens")


def ranking_quality(
    scores: Tensor, labels: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> dict[str, float]:
    """NDCG@10, MRR and PNR of scores (Q, N) or (D,) against labels, over the queries that can tell.

    Those are the queries with a relevant document for the first two, all labelled pairs for PNR. Equal scores share
    their gain in NDCG and count half in PNR. Without a query that can tell: NaN.
    """
    layout = {"mask": mask, "cu_seqlens": cu_seqlens}
    return {
        "ndcg@10": float(ndcg(scores, labels, k=10, ties="average", empty="skip", **layout)),
        "mrr": float(mrr(scores, labels, empty="skip", **layout)),
        "pnr": float(pnr(scores, labels, ties="half", **layout)),
    }


def _compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    logits, (labels, lengths) = prediction.predictions, prediction.label_ids
    logits, labels, lengths = map(torch.as_tensor, (logits, labels, lengths))
    mask = torch.arange(logits.shape[1]) < lengths[:, None]
    return ranking_quality(logits, labels, mask=mask)


class PileTrainer(Trainer):
    """A `Trainer` whose rows are queries and whose loss is a function of (student, teachers, labels).

    An optimiser step lowers the mean loss over all of its queries, whatever `gradient_accumulation_steps` and the
    number of processes: 1 × 32 queries and 4 × 8 take the same step. A query without a pair counts with a loss of 0.

    Args:
        *args, **kwargs: `Trainer`'s. A data set's row is a dict of a query's tensors: `labels` (n,),
            `teacher_logits` (n, M) and the model's inputs, e.g. `RankedLists`. The collator defaults to `pack_queries`,
            `compute_metrics` to `ranking_quality`.
        loss: called as ``loss(student_logits, teacher_logits, labels, cu_seqlens=cu_seqlens)`` on packed tensors,
            returns the queries' losses (Q,). Default: ``PILELoss(reduction="none")``; its ``alpha=0`` trains on the
            labels alone, its ``iterations=0`` on the mean ensemble.
    """

    # `compute_loss` divides by the queries of the whole step, so the Trainer must not divide by the number of batches.
    loss_is_scaled_for_ga = True

    def __init__(self, *args, loss: Callable[..., Tensor] | None = None, **kwargs):
        kwargs.setdefault("data_collator", pack_queries)
        kwargs.setdefault("compute_metrics", _compute_metrics)
        super().__init__(*args, **kwargs)
        self.loss = PILELoss(reduction="none") if loss is None else loss
        if isinstance(self.loss, torch.nn.Module):
            self.loss.to(self.args.device)
        # The model's forward names neither labels nor teachers: without these two the Trainer would drop both.
        self.args.remove_unused_columns = False
        self.label_names = ["labels"]
        # What `loss_is_scaled_for_ga` says to versions of transformers that do not know it.
        self.model_accepts_loss_kwargs = True

    def get_batch_samples(self, *args, **kwargs) -> tuple[list, Tensor]:
        """The batches of one optimiser step and the number of their queries, over all processes."""
        batches, _ = super().get_batch_samples(*args, **kwargs)  # its own count is of labels
        queries = torch.tensor(sum(len(batch["cu_seqlens"]) - 1 for batch in batches), device=self.args.device)
        return batches, self.accelerator.gather(queries).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one packed batch, as its share of the step's mean: Σ over its queries / queries of the step."""
        outputs = model(**{name: value for name, value in inputs.items() if name not in _TARGETS})
        logits = getattr(outputs, "logits", outputs)
        cu_seqlens = inputs["cu_seqlens"]
        losses = self.loss(logits, inputs["teacher_logits"], inputs["labels"], cu_seqlens=cu_seqlens)
        if losses.shape != (len(cu_seqlens) - 1,):
            raise ValueError(
                f"loss: expected the queries' losses (Q,) = ({len(cu_seqlens) - 1},), got {tuple(losses.shape)}; build "
                "the loss with reduction='none', so that gradient accumulation can take the mean over a step's queries"
            )
        if model.training and num_items_in_batch is not None:
            # Data-parallel training averages the processes' gradients; the sum is wanted.
            loss = losses.sum() * (self.accelerator.num_processes / num_items_in_batch)
        else:
            loss = losses.mean()
        return (loss, {"logits": logits}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss, logits (Q, N), and (labels (Q, N), lengths (Q,)).

        Padded, because the Trainer gathers and trims predictions by rows, and its rows are queries: a packed tensor
        would lose documents in the last batch. What is in the padding does not matter, the lengths tell.
        """
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if logits is None:
            return loss, None, None
        lengths = inputs["cu_seqlens"].diff().to(logits.device)
        logits, labels = (
            torch.nn.utils.rnn.pad_sequence(x.float().split(lengths.tolist()), batch_first=True) for x in (logits, labels)
        )
        return loss, logits, (labels, lengths)
