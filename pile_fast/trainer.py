"""`PileTrainer`: `transformers.Trainer` on packed queries, and `pile_compute_loss_func` for a `Trainer` of your own.

It adds to the Trainer: batches of packed queries, the loss and what it logs, gradient caching, ranking metrics, checkpoints
that are known to be complete, and a stop before numbers that are not finite reach the weights.
"""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pile_fast.data.collator import (
    BiEncoderCollator,
    CrossEncoderCollator,
    FeatureCollator,
    RankingTargets,
    order_of_teachers,
    queries_of,
)
from pile_fast.data.lists import RankedLists
from pile_fast.data.rows import default_names
from pile_fast.data.teacher_weights import FILE_NAME, TeacherWeights
from pile_fast.ensembles.pile import pile_with_weights
from pile_fast.evaluation.metrics import average_precision, mrr, ndcg, pnr
from pile_fast.extras import needs_extra
from pile_fast.functional import distillation_loss, ranking_loss
from pile_fast.loss import PILELoss
from pile_fast.options import EnsembleOptions
from pile_fast.students import BiEncoderConfig
from pile_fast.students.gradient_cache import forward_in_passes, logits_of
from pile_fast.students.ranker import longest_text, serve_logits
from pile_fast.students.step_check import StepCheck, check_weights, shown
from pile_fast.students.training_data import NamedLists, check_data, is_stream, labelled_targets, teachers_of

with needs_extra("train"):
    from tqdm import tqdm
    from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

# Of a checkpoint, where weights of teachers are learned in training: the state of the loss.
_LOSS_STATE = "pile_loss.pt"


def ranking_quality(
    scores: Tensor, labels: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, k: int = 10
) -> dict[str, float]:
    """NDCG@k, MRR, MAP and PNR of scores (Q, N) or (D,) against labels, over the queries that can tell.

    Those are the queries with a relevant document (label >= 1; > 0 for NDCG), all labelled pairs for PNR. Equal scores
    share their gain in NDCG and count half in PNR. Without a query that can tell: NaN.
    """
    layout: dict[str, Any] = {"mask": mask, "cu_seqlens": cu_seqlens}
    return {
        f"ndcg@{k}": float(ndcg(scores, labels, k=k, ties="average", empty="skip", **layout)),
        "mrr": float(mrr(scores, labels, empty="skip", **layout)),
        "map": float(average_precision(scores, labels, empty="skip", **layout)),
        "pnr": float(cast(Tensor, pnr(scores, labels, ties="half", **layout))),
    }


def loss_components(
    loss: PILELoss, logits: Tensor, targets: RankingTargets, teacher_names: Sequence[str] | None = None
) -> dict[str, float]:
    """The parts of a batch's loss, and how the ensemble weighs the teachers.

    Args:
        loss: whose options apply.
        logits: (D,) of the student.
        targets: the batch's.
        teacher_names: M names; None = their numbers.

    Returns:
        `distillation_loss` and `label_loss`, each over the queries that have such a pair and before `alpha` weighs them;
        `teacher_weight/<name>`, the loss's weights that all queries share; with granularity "document" or "query" the mean over
        the documents that some teacher scored, or over the queries;
        `teacher_weight_entropy` in nats, between 0 (one teacher has all the weight) and log M. Without teachers only the
        label loss.
    """
    options, cu_seqlens = loss.options, targets["cu_seqlens"]
    logits, teachers, labels = logits.detach(), targets["teacher_logits"], targets["labels"]
    pairs: dict[str, Any] = {"cu_seqlens": cu_seqlens, "pairwise": options["pairwise"], "backend": options["backend"]}
    label_loss = ranking_loss(logits, labels, kind=options["label_loss"], pair_weight=options["pair_weight"], **pairs)
    components = {"label_loss": label_loss.item()}
    if teachers.shape[1] == 0:
        return components
    of_ensemble: dict[str, Any] = {name: options[name] for name in (*EnsembleOptions._fields, "backend")}
    prior = loss.prior
    if loss.learns:  # the weights are there, or else the prior's until a first step
        prior = loss.weights if len(loss.weights) else prior
        of_ensemble["iterations"] = 0
    ensemble = pile_with_weights(teachers, labels, cu_seqlens=cu_seqlens, prior=prior, **of_ensemble)
    distillation = distillation_loss(logits, ensemble.logits, kind=options["distillation"], **pairs)
    weights = ensemble.weights[ensemble.weights.sum(-1) > 0]
    mean = weights.mean(0).tolist()
    names = teacher_names or [str(m) for m in range(1, len(mean) + 1)]
    return {
        "distillation_loss": distillation.item(),
        **components,
        "teacher_weight_entropy": torch.special.entr(weights).sum(-1).mean().item(),
        **{f"teacher_weight/{name}": weight for name, weight in zip(names, mean, strict=True)},
    }


def query_losses(loss: Callable[..., Tensor], logits: Tensor, targets: RankingTargets) -> Tensor:
    """The queries' losses (Q,) of a packed batch.

    Raises:
        ValueError: there are no teachers to distil, or the loss is reduced over the queries already.
    """
    teachers, cu_seqlens = targets["teacher_logits"], targets["cu_seqlens"]
    if teachers.shape[1] == 0 and isinstance(loss, PILELoss):
        if needs_teachers(loss):
            raise ValueError(
                f"teacher_logits: expected at least one teacher, as alpha is {loss.options['alpha']:g}, got none for "
                f"query {queries_of(targets)[0]}; alpha=0 learns from the labels alone. A Trainer drops what the model's "
                "forward does not name unless it is told TrainingArguments(remove_unused_columns=False)"
            )
        teachers = torch.full_like(logits.detach(), torch.nan).unsqueeze(1)
    losses = loss(logits, teachers, targets["labels"], cu_seqlens=cu_seqlens)
    if losses.shape != (len(cu_seqlens) - 1,):
        raise ValueError(
            f"loss: expected the queries' losses (Q,) = ({len(cu_seqlens) - 1},), got {tuple(losses.shape)}; build "
            "the loss with reduction='none', so that gradient accumulation can take the mean over a step's queries"
        )
    return losses


def needs_teachers(loss: Callable[..., Tensor]) -> bool:
    """Whether a loss is known to distil: it cannot be computed on rows without teachers."""
    return isinstance(loss, PILELoss) and loss.options["alpha"] > 0


def _packed(labels: object) -> Any:
    """A batch's targets, if one of our collators made them.

    Raises:
        ValueError: it was another one.
    """
    if isinstance(labels, Mapping) and {"labels", "teacher_logits", "cu_seqlens"} <= labels.keys():
        return labels
    given = f"a tensor {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
    raise ValueError(
        f"labels: expected the RankingTargets that a collator of pile_fast.data.collator makes, got {given}; give the Trainer "
        "data_collator=CrossEncoderCollator(tokenizer), BiEncoderCollator(tokenizer) or FeatureCollator()"
    )


def pile_compute_loss_func(**options: Any) -> Callable[..., Tensor]:
    """A `compute_loss_func` for a `transformers.Trainer` of your own.

    Give that Trainer one of the collators of `pile_fast.data.collator`, ``remove_unused_columns=False`` and, for a model whose
    forward does not name labels, ``label_names=["labels"]``. Its optimiser steps are those of a `PileTrainer`: the mean over
    the step's queries, whatever the gradient accumulation and the number of processes (with ``average_tokens_across_devices``,
    the default). Evaluate with ``prediction_loss_only=True``: a plain Trainer cannot tell the queries of packed predictions.

    A loss that is not finite raises FloatingPointError, which names the queries. To know costs a reading of the device per
    batch, which the Trainer's own filter (``logging_nan_inf_filter``) does anyway.

    The function's attribute `loss` is its `PILELoss`. Fit the weights of the teachers before training:
    ``compute_loss.loss.fit(loader)``, see `pile_fast.PILELoss.fit`. Without that they are learned step by step, for which
    `accumulation_steps` is that of the Trainer, and are not in its checkpoints: resume with ``compute_loss.loss.state_dict()``.
    An evaluation never changes them.

    Args:
        **options: of `PILELoss`, but for `reduction`.

    >>> compute_loss = pile_compute_loss_func(alpha=0.7)
    >>> targets = RankingTargets(
    ...     labels=torch.tensor([1.0, 0.0]), teacher_logits=torch.tensor([[2.0], [1.0]]), cu_seqlens=torch.tensor([0, 2])
    ... )
    >>> compute_loss(torch.tensor([0.3, 0.1], requires_grad=True), targets).requires_grad
    True
    """
    loss = PILELoss(reduction="none", **options)
    warned = False

    def compute_loss(outputs: Any, labels: RankingTargets, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        nonlocal warned
        warned = warn_of_infinite(_packed(labels), warned)
        logits = logits_of(outputs)
        # A Trainer says of its model alone whether it is trained and where it is.
        loss.train(logits.requires_grad)
        if loss.fitted.device != logits.device:
            loss.to(logits.device)
        losses = query_losses(loss, logits, labels)
        if not (finite := losses.detach().isfinite()).all():
            bad = [name for name, good in zip(queries_of(labels), finite.tolist(), strict=True) if not good]
            raise FloatingPointError(f"the loss is not finite for queries {shown(bad)}")
        # In training the Trainer counts the step's items, which are queries (RankingTargets.ne), and divides no further.
        return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch

    compute_loss.loss = loss  # type: ignore[attr-defined]
    return compute_loss


def warn_of_infinite(targets: Mapping, warned: bool) -> bool:
    """Say once that an infinite teacher logit counts as missing; returns whether it has been said."""
    where = targets.get("infinite")
    if where and not warned:
        warnings.warn(f"teacher_logits: {where} an infinite logit, which counts as missing; shown once", stacklevel=2)
    return warned or bool(where)


def last_checkpoint(folder: str | os.PathLike, *, processes: int = 1) -> str | None:
    """The newest checkpoint below `folder` that was written to its end, or None.

    The Trainer writes a checkpoint's files one after the other, its state last; a killed process may leave any of them
    half-written or missing.
    """
    found = []
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if number.isdecimal() and _is_whole(path, processes):
            found.append((int(number), str(path)))
    return max(found)[1] if found else None


def _is_whole(checkpoint: Path, processes: int) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    # A .pth file is a zip archive, whose directory is written last.
    states = [checkpoint / "rng_state.pth"] if processes == 1 else [checkpoint / f"rng_state_{i}.pth" for i in range(processes)]
    return all(zipfile.is_zipfile(path) for path in states)


class PileTrainer(Trainer):
    """A `Trainer` whose rows are queries and whose loss is a function of (student, teachers, labels).

    Before the first step a `PILELoss` learns the teachers' weights that all queries share from all rows of `train_dataset`, one
    pass over teachers and labels with a progress bar; a loss that was fitted already keeps its weights. Rows that are read as
    they come cannot be read twice: there each optimiser step of training takes a step of the weights. Evaluation uses the
    weights as they are. They are saved beside the student in `teacher_weights.json` (`pile_fast.data.TeacherWeights`), and
    checkpoints hold the state of the loss, so that resumed training goes on with the same weights.

    An optimiser step lowers the mean loss over all of its queries, whatever `gradient_accumulation_steps` and the
    number of processes: 1 × 32 queries and 4 × 8 take the same step. A query without a pair counts with a loss of 0.

    Training stops with FloatingPointError, on all processes, before the first step whose losses or gradients are not finite
    (`pile_fast.students.step_check`), and before a model that a step broke is evaluated or saved. The message names the step
    and its queries; checkpoints stay. Data sets that do not fit the loss, the metrics or each other are an error of `train`,
    by their first rows: before the first step.

    Args:
        model, args, data_collator, **kwargs: `Trainer`'s. The model is a `FeatureRanker`, a `BiEncoder`, or any model for
            sequence classification with one output; text models need their tokenizer as `processing_class`. A data set's
            row is a query of the data schema (docs/data.md): a `datasets.Dataset`, a list of dicts, `RankedLists`, or an
            iterable data set of `datasets` or of PyTorch, which is read as it comes (`max_steps` says how far). Teachers are
            matched by the names in the rows. `data_collator` and `compute_metrics` (`ranking_quality`) follow from that.
            Evaluation needs no teachers: without them there is no loss.
        loss: called as ``loss(student_logits, teacher_logits, labels, cu_seqlens=cu_seqlens)`` on packed tensors,
            returns the queries' losses (Q,). Default: ``PILELoss(reduction="none")``; its ``alpha=0`` trains on the
            labels alone, its ``iterations=0`` on the mean ensemble.
        max_documents_per_batch: texts that the encoder sees at a time, whatever a batch holds: bounds the memory, for a
            second forward of all but the last of them (`pile_fast.students.gradient_cache`). The loss still sees whole lists.
            On one process or under DDP.
        k: of NDCG@k at evaluation.
        log_components: log `loss_components` of the last batch with every training loss; costs as much as one loss, at
            logging steps only. For a `PILELoss`.

    Raises:
        ValueError: no tokenizer for a text model, or several GPUs in one process (torchrun starts one process for each).
    """

    # `compute_loss` divides by the queries of the whole step, so the Trainer must not divide by the number of batches.
    loss_is_scaled_for_ga = True
    model: nn.Module

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        data_collator: Callable[[Sequence[dict]], dict] | None = None,
        loss: Callable[..., Tensor] | None = None,
        max_documents_per_batch: int | None = None,
        k: int = 10,
        log_components: bool = True,
        **kwargs: Any,
    ) -> None:
        if max_documents_per_batch is not None and max_documents_per_batch < 1:
            raise ValueError(f"max_documents_per_batch: expected a whole number >= 1, got {max_documents_per_batch}")
        kwargs.setdefault("compute_metrics", RankingMetrics(k))
        for name in ("train_dataset", "eval_dataset"):
            if isinstance(kwargs.get(name), RankedLists):
                kwargs[name] = NamedLists(kwargs[name])
        super().__init__(model, args, data_collator, **kwargs)
        serve_logits(self.model)
        if data_collator is None:
            self.data_collator = _collator_for(self.model, self.processing_class)
        self.loss = PILELoss(reduction="none") if loss is None else loss
        if isinstance(self.loss, nn.Module):
            self.loss.to(self.args.device)
        self.max_documents_per_batch = max_documents_per_batch
        if self.args.n_gpu > 1:
            raise ValueError(f"expected one GPU per process, got {self.args.n_gpu}: start with torchrun --nproc-per-node=...")
        if max_documents_per_batch is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("max_documents_per_batch: works on one process or under DDP, not with FSDP or DeepSpeed")
        if self.accelerator.dispatch_batches and self.args.world_size > 1:
            raise ValueError(
                "dispatch_batches: a batch of packed queries cannot be cut into the processes' shares, leave it off"
            )
        # What accelerate does with data sets that have no length, if it is not told: cut up batches by their first dimension.
        self.accelerator.dataloader_config.dispatch_batches = False
        # The check of a step tells more, and reads the device less often.
        self.args.logging_nan_inf_filter = False
        # The model's forward names neither labels nor teachers: without these two the Trainer would drop both.
        self.args.remove_unused_columns = False
        self.label_names = ["labels"]
        # What `loss_is_scaled_for_ga` says to versions of transformers that do not know it.
        self.model_accepts_loss_kwargs = True
        self._log_components = log_components
        self._epochs = _Epochs(self.loss)
        self.add_callback(self._epochs)
        self._last_batch: tuple[Tensor, RankingTargets] | None = None
        self._check = StepCheck(self.accelerator)
        self._teachers: Sequence[str] | None = None
        self._said: set[str] = set()
        self._lossless = False
        self._evaluated: list[Tensor] = []

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, *args: Any, **kwargs: Any) -> tuple[list, Tensor]:
        """The batches of one optimiser step and the number of their queries, over all processes.

        None at the end of a data set without a length, where there are fewer than a step takes: the Trainer would leave their
        gradients to the next step.

        Raises:
            ValueError: such a data set has fewer rows than the first step takes.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, *args, **kwargs)  # its count depends on arguments
        if len(batches) < num_batches and not has_length(self.train_dataset):
            batches = []
            if self.state.global_step == 0:
                rows = self.get_total_train_batch_size(self.args)
                raise ValueError(f"train_dataset: gave fewer rows than an optimiser step takes, which is {rows}")
        queries = sum(len(_packed(batch.get("labels"))["cu_seqlens"]) - 1 for batch in batches)
        return batches, self.accelerator.gather(torch.tensor(queries, device=self.args.device)).sum()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one packed batch, as its share of the step's mean: Σ over its queries / queries of the step."""
        inputs = dict(inputs)
        targets = self._matched(_packed(inputs.pop("labels", None)))
        logits = forward_in_passes(model, inputs, self.max_documents_per_batch)
        if not model.training and targets["teacher_logits"].shape[1] == 0 and needs_teachers(self.loss):
            self._lossless = True
            self._say("no loss", "evaluation: the rows have no teachers, so there is no loss, only metrics")
            losses = logits.new_full((len(targets["cu_seqlens"]) - 1,), torch.nan)
        else:
            if isinstance(self.loss, nn.Module):
                self.loss.train(model.training)
            losses = query_losses(self.loss, logits, targets)
        if model.training and num_items_in_batch is not None:
            self._last_batch = (logits.detach(), targets)
            self._check.add(losses, logits, targets["cu_seqlens"], queries_of(targets))
            # Data-parallel training averages the processes' gradients; the sum is wanted.
            loss = losses.sum() * (self.accelerator.num_processes / num_items_in_batch)
        else:
            loss = losses.mean()
        if not model.training:
            self._evaluated.append(losses.detach())
        return (loss, {"logits": logits}) if return_outputs else loss

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """A batch's forward and backward; after the last of an optimiser step, whether it may be taken."""
        loss = super().training_step(model, *args, **kwargs)
        if self.accelerator.sync_gradients:
            step = self.state.global_step + 1
            self._check.finish(model, step)
            if self._check.idle:
                queries = f"step {step}: the loss of all its queries is 0 ({shown(self._check.queries)})"
                self._say("idle", f"{queries}: none has two documents to tell apart, nothing is learned from them")
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """What the Trainer logs and, with a training loss, the components of the last batch's."""
        if "loss" in logs and self._log_components and isinstance(self.loss, PILELoss) and self._last_batch is not None:
            logs = logs | loss_components(self.loss, *self._last_batch, self._teachers)
        super().log(logs, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The Trainer's. Several processes read a data set without a length into memory: else the rows that fill up its last
        batch would count twice."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = cast(dict, self.eval_dataset)[eval_dataset] if isinstance(eval_dataset, str) else dataset
        if dataset is not None and not has_length(dataset) and self.args.world_size > 1:
            eval_dataset = list(dataset)
        return super().get_eval_dataloader(eval_dataset)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, of a model that is whole.

        The loss is left out where the rows have no teachers to compute it with, and is the mean over the queries also of a data
        set without a length, of which the Trainer counts a short last batch like the others.
        """
        if self.is_in_train:
            check_weights(self.model, self.state.global_step, self._check.queries)
        elif self.train_dataset is not None:
            self._fit()
        self._lossless, self._evaluated = False, []
        output: Any = super().evaluation_loop(dataloader, *args, **kwargs)
        name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if self._lossless:
            output.metrics.pop(name, None)
        elif name in output.metrics and not has_length(dataloader):
            output.metrics[name] = torch.cat(self._evaluated).mean().item()
        self._evaluated = []
        return output

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's, of a model that is whole, and the teachers' weights beside it."""
        check_weights(self.model, self.state.global_step, self._check.queries)
        super().save_model(*args, **kwargs)
        folder = Path(cast(str, kwargs.get("output_dir", args[0] if args else None) or self.args.output_dir))
        if self.args.should_save and (weights := self.teacher_weights()) is not None:
            weights.save(folder / FILE_NAME)

    def teacher_weights(self) -> TeacherWeights | None:
        """The teachers' weights that all queries share; None where the loss learns none, or has not yet."""
        loss = self.loss
        if not isinstance(loss, PILELoss) or not loss.learns or not len(loss.weights):
            return None
        names = self._teachers or teachers_of(self.train_dataset) or default_names(len(loss.weights))
        return TeacherWeights.of(loss, names)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Loss, logits (Q, N), and (labels (Q, N), lengths (Q,)).

        Padded, because the Trainer gathers and trims predictions by rows, and its rows are queries: a packed tensor
        would lose documents in the last batch. What is in the padding does not matter, the lengths tell.

        Raises:
            FloatingPointError: a logit is NaN, which cannot be ranked; names the queries.
        """
        step: tuple[Any, ...] = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        loss, logits, targets = step
        if logits is None:
            return loss, None, None
        lengths = targets["cu_seqlens"].diff()
        logits, labels = (
            nn.utils.rnn.pad_sequence(x.split(lengths.tolist()), batch_first=True)
            for x in (logits.float(), targets["labels"].double())
        )
        if (nan := logits.isnan().any(1)).any():
            bad = [name for name, is_nan in zip(queries_of(targets), nan.tolist(), strict=True) if is_nan]
            raise FloatingPointError(f"evaluation: the student's logits are NaN for queries {shown(bad)}")
        return loss, logits, (labels, lengths)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; ``resume_from_checkpoint=True`` means the newest checkpoint that is whole, see `last_checkpoint`."""
        if resume_from_checkpoint is True:
            found = last_checkpoint(str(self.args.output_dir), processes=self.args.world_size)
            resume_from_checkpoint = True if found is None else found  # then the Trainer reports that there is none
        evaluated = self.compute_metrics if self.args.eval_strategy != "no" else None
        metrics = evaluated.names() if isinstance(evaluated, RankingMetrics) else None
        check_data(
            self.train_dataset, self.eval_dataset, self.data_collator, needs_teachers=needs_teachers(self.loss),
            needs_labels=isinstance(self.loss, PILELoss) and self.loss.options["alpha"] == 0,
            best_metric=None if metrics is None else self.args.metric_for_best_model, metrics=metrics,
        )  # fmt: skip
        self._check, self._teachers = StepCheck(self.accelerator), None
        if isinstance(resume_from_checkpoint, (str, os.PathLike)):
            self._load_loss(Path(resume_from_checkpoint))
        self._fit()
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        check_weights(self.model, self.state.global_step, self._check.queries)
        return output

    def _fit(self) -> None:
        """Let the loss learn the teachers' weights from the training rows, or prepare it to do so in training."""
        loss = self.loss
        if not isinstance(loss, PILELoss) or not loss.learns or bool(loss.fitted):
            return
        if is_stream(self.train_dataset):
            loss.accumulation_steps = self.args.gradient_accumulation_steps
            return
        hide = self.args.disable_tqdm or not self.is_world_process_zero()
        with tqdm(total=len(cast(Any, self.train_dataset)), desc="Teachers' weights", unit=" queries", disable=hide) as bar:

            def batches() -> Iterator[RankingTargets]:
                for rows, targets in labelled_targets(self.train_dataset, self.data_collator):
                    if targets is not None:
                        yield self._matched(_packed(targets))
                    bar.update(rows)

            loss.fit(batches(), sharded=False)

    def _load_loss(self, checkpoint: Path) -> None:
        """The state of the loss in a checkpoint, if it has one."""
        if isinstance(self.loss, PILELoss) and (path := checkpoint / _LOSS_STATE).is_file():
            saved = torch.load(path, map_location=self.args.device, weights_only=True)
            self.loss.load_state_dict(saved["loss"])
            self._epochs.passes = saved["passes"]

    def _save_rng_state(self, output_dir: str) -> None:
        if self.args.should_save and self.teacher_weights() is not None:
            state = {"loss": cast(PILELoss, self.loss).state_dict(), "passes": self._epochs.passes - 1}
            torch.save(state, Path(output_dir) / _LOSS_STATE)
        super()._save_rng_state(output_dir)
        # The first process writes the checkpoint's last file next, and then removes older checkpoints.
        self.accelerator.wait_for_everyone()

    def _matched(self, targets: RankingTargets) -> RankingTargets:
        """The targets with the teachers in the order of the first training row's, by their names."""
        if warn_of_infinite(targets, "infinite" in self._said):
            self._said.add("infinite")
        names, count = targets.get("teachers"), targets["teacher_logits"].shape[1]
        if names is None or not count:
            return targets
        if self._teachers is None:
            self._teachers = teachers_of(self.train_dataset) or names
        if names == self._teachers:
            return targets
        order = order_of_teachers(names, self._teachers, f"query {queries_of(targets)[0]}", "the first row")
        return RankingTargets(targets, teacher_logits=targets["teacher_logits"][:, order], teachers=self._teachers)

    def _say(self, what: str, text: str) -> None:
        """A warning, once."""
        if what not in self._said and self.is_world_process_zero():
            warnings.warn(text, stacklevel=3)
        self._said.add(what)


def _collator_for(model: Any, tokenizer: Any) -> Callable[[Sequence[dict]], dict]:
    config: Any = getattr(model, "config", None)
    if tokenizer is None:
        if getattr(model, "main_input_name", None) == "input_ids":
            raise ValueError("processing_class: expected the text model's tokenizer, got None")
        return FeatureCollator()
    kind = BiEncoderCollator if config.model_type == BiEncoderConfig.model_type else CrossEncoderCollator
    return kind(tokenizer, longest_text(tokenizer, model))


class _Epochs(TrainerCallback):
    """Tells the loss which pass over the rows begins: the Trainer's own count knows none of rows without a length."""

    def __init__(self, loss: Callable[..., Tensor]):
        self._loss = loss
        self.passes = 0

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        if isinstance(self._loss, PILELoss):
            self._loss.set_epoch(self.passes)
        self.passes += 1


class RankingMetrics:
    """A `compute_metrics` of what `PileTrainer.prediction_step` gives: `ranking_quality`."""

    def __init__(self, k: int):
        self.k = k
        self._batches: list[tuple] = []

    def names(self) -> set[str]:
        """What it computes."""
        return set(ranking_quality(torch.zeros(1, 1), torch.zeros(1, 1), k=self.k))

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """The metrics of a whole evaluation, given at once, as a list of batches (``eval_do_concat_batches=False``) or batch
        by batch (``batch_eval_metrics=True``), the last one with `compute_result`."""
        given: Any = prediction.predictions
        targets: Any = prediction.label_ids
        for scores, (own, sizes) in zip(given, targets, strict=True) if isinstance(given, list) else [(given, targets)]:
            logits, labels, lengths = map(torch.as_tensor, (scores, own, sizes))
            mask = torch.arange(logits.shape[1], device=logits.device) < lengths[:, None]
            self._batches.append((logits[mask].cpu(), labels[mask].cpu(), lengths.cpu()))
        if not compute_result:
            return {}
        logits, labels, lengths = (torch.cat(parts) for parts in zip(*self._batches, strict=True))
        self._batches = []
        cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0))
        return ranking_quality(logits, labels, cu_seqlens=cu_seqlens, k=self.k)
