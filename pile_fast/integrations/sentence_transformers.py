"""PILE as a loss for sentence-transformers' `CrossEncoderTrainer` and `SentenceTransformerTrainer`.

The library's collators make tensors of the labels, and fail at a null among them: "Could not infer dtype of NoneType".
Importing this module gives both trainers a collator that makes NaN of it, for models that one of these losses trains and for no
others.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

import pile_fast
from pile_fast import terms
from pile_fast.checks import number
from pile_fast.extras import needs_extra
from pile_fast.integrations.columns import (
    LABEL_COLUMNS,
    Names,
    RankedBatch,
    is_list_of_texts_or_numbers,
    read_lists,
    read_tuples,
    without_null,
)
from pile_fast.reference import has_label_loss

with needs_extra("sentence-transformers"):
    import sentence_transformers as library
    from sentence_transformers import util


if int(library.__version__.split(".")[0]) < 6:
    raise ImportError(
        f"sentence_transformers: expected 6 or later, got {library.__version__}: pip install 'pile_fast[sentence-transformers]'"
    )
CrossEncoderTrainer, SentenceTransformerTrainer = library.CrossEncoderTrainer, library.SentenceTransformerTrainer
logger = logging.getLogger(__name__)
# Rows at a time, where a data set is read before training.
_ROWS = 256


class _PILELoss(nn.Module):
    """What both losses have in common: the options, the terms, the look at the first batch, what the model card says."""

    _model_class: str

    def __init__(self, model: Any, activation_fn: nn.Module | None = None, **options: Any) -> None:
        super().__init__()
        if not isinstance(model, getattr(library, self._model_class)):
            others = {loss._model_class: loss.__name__ for loss in (PILELoss, BiEncoderPILELoss)}
            fitting = next((name for kind, name in others.items() if isinstance(model, getattr(library, kind))), None)
            hint = f"; for it there is {fitting}" if fitting else ""
            raise ValueError(f"model: expected a {self._model_class}, got a {type(model).__name__}{hint}")
        if options.get("reduction") == "none":
            raise ValueError("reduction: expected 'mean' or 'sum', got 'none'; the trainer wants one number")
        if options.get("prior") is not None:
            options["prior"] = torch.as_tensor(options["prior"], dtype=torch.float32)
        self.activation_fn: Any = activation_fn
        self._card = model.model_card_data  # in which a trainer notes its data sets when it is built
        self.model = model
        self.loss = pile_fast.PILELoss(**options)
        self._told = self._told_of_infinity = False

    def __setattr__(self, name: str, value: Any) -> None:
        # The trainer puts another model in the model's place by this name: a new one of `model_init`, a DDP or compiled one.
        if name == "model" and isinstance(value, getattr(library, self._model_class)):
            value.pile_fast_labels = True  # for the collator
            if self.activation_fn is not None:
                value.activation_fn = self.activation_fn
        super().__setattr__(name, value)

    def _names(self, inputs: int, labels: bool) -> Names:
        """The batch's columns' names, by the data sets that the trainer noted in the model card."""
        datasets = (*self._card.train_datasets, *self._card.eval_datasets)
        columns = [[re.sub("^<code>|</code>$", "", name) for name in dataset.get("columns", ())] for dataset in datasets]
        return Names.of(columns, inputs, labels)

    def fit(self, dataset: Any) -> Self:
        """Learn the teachers' weights that all queries share from a data set, before training; then they stay.

        Without it, and of a data set that is read as it comes, each batch of training takes a step of the weights; evaluation
        never does. The trainer's checkpoints do not hold the weights: to resume with the same ones, fit.

        Args:
            dataset: the `datasets.Dataset` that the trainer gets, or a dict of them by name. In distributed training all
                processes give the whole of it.

        Returns:
            The loss.

        Raises:
            ValueError: a row does not fit; the message names column and row, counted from 0 in each 256 rows.
            RuntimeError: the options have no weights that all queries share, see `pile_fast.PILELoss.fit`.
        """
        datasets = dataset.values() if isinstance(dataset, Mapping) else [dataset]
        self.loss.fit((batch for own in datasets for batch in self._batches(own)), sharded=False)
        return self

    def _batches(self, dataset: Any) -> Iterator[dict[str, Tensor]]:
        """Teachers and labels of a data set."""
        label = next((name for name in LABEL_COLUMNS if name in dataset.column_names), None)
        inputs = [name for name in dataset.column_names if name != label]
        names = Names.of([dataset.column_names], len(inputs), label is not None)
        plain = dataset.with_format(None)
        for start in range(0, len(plain), _ROWS):
            rows = plain[start : start + _ROWS]
            batch = self._read([rows[name] for name in inputs], None if label is None else rows[label], names)
            if batch.teachers is not None and batch.labels is not None:
                cu_seqlens = torch.tensor([0, *itertools.accumulate(batch.lengths)])
                yield {"teacher_logits": batch.teachers, "labels": batch.labels, "cu_seqlens": cu_seqlens}

    def _read(self, inputs: list, labels: Any, names: Names) -> RankedBatch:
        """Columns of rows as they are in a data set."""
        raise NotImplementedError

    def _targets(self, batch: RankedBatch, queries: list | None, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(teachers (D, M), labels (D,), cu_seqlens) on the device, NaN for what is missing."""
        self.loss.train(self.model.training)  # the trainer tells the model alone when it evaluates
        documents = sum(batch.lengths)
        teachers = torch.full((documents, 1), torch.nan) if batch.teachers is None else batch.teachers
        if not self._told:
            self._told = True
            logger.log(logging.WARNING if batch.told else logging.INFO, "PILELoss: in the first batch, %s.", batch.reading)
            if batch.teachers is not None:
                _check_teachers(teachers.cpu().numpy(), batch.lengths)
        infinite = teachers.isinf()
        if not self._told_of_infinity and bool(infinite.any()):
            self._told_of_infinity = True
            document, teacher = infinite.nonzero()[0].tolist()
            query = int(torch.repeat_interleave(torch.tensor(batch.lengths))[document])
            text = "" if queries is None else f" ({queries[query]!r})"
            logger.warning(
                "PILELoss: teacher %d gave an infinite logit for query %d of the batch%s; it counts as missing.",
                teacher + 1, query, text,
            )  # fmt: skip
        teachers = teachers.masked_fill(infinite, torch.nan)
        labels = torch.full((documents,), torch.nan) if batch.labels is None else batch.labels
        cu_seqlens = torch.tensor([0, *itertools.accumulate(batch.lengths)], dtype=torch.int32)
        return teachers.to(device), labels.to(device), cu_seqlens.to(device)

    def get_config_dict(self) -> dict:
        """What the model card says of the loss."""
        prior = self.loss.prior
        return {**self.loss.options, "prior": None if prior is None else prior.tolist()}

    @property
    def citation(self) -> str:
        return """
@inproceedings{cai2022pile,
    title = "{PILE}: Pairwise Iterative Logits Ensemble for Multi-Teacher Labeled Distillation",
    author = "Cai, Lianshang and Zhang, Linhao and Ma, Dehong and Fan, Jun and Shi, Daiting and Wu, Yi and
      Cheng, Zhicong and Gu, Simiu and Yin, Dawei",
    booktitle = "Proceedings of the 2022 Conference on Empirical Methods in Natural Language Processing: Industry Track",
    year = "2022",
    pages = "587--595",
    doi = "10.18653/v1/2022.emnlp-industry.60",
}
"""


class PILELoss(_PILELoss):
    """Distil several teachers into a `CrossEncoder`; takes the place of `LambdaLoss` and its kin.

    A training row holds a query, its documents, their labels, and what the teachers said. Lists may have any length.

    ====================  ===============================================================================================
    column                content
    ====================  ===============================================================================================
    first                 the query
    second                a list of n documents; or, in as many columns, a document each: positive, negative_1, ...
    next                  teachers' logits: n × M, or n for a single teacher; None or NaN = did not score this document
    ``labels``            n labels, larger is better, None or NaN = unlabelled. Or, in place of further columns, n × (1 + M):
                          label and teachers' logits
    ====================  ===============================================================================================

    Names are free but for the labels' one: the trainer takes the first of ``label``, ``labels``, ``score``, ``scores`` that it
    finds. A column ``scores`` of teachers' logits beside ``labels`` is fine. Teachers may be left out at alpha = 0, labels at
    alpha = 1.

    Rows with a document per column are those of `MarginMSELoss` and `DistillKLDivLoss`: n numbers under ``label`` are what one
    teacher says of the n documents (not differences), and the labels then are 1 for the first document and 0 for the others.
    With columns of teachers' logits beside it, or at alpha = 0, ``label`` holds labels.

    At the first batch a warning says how each column was read.

    The loss is that of `pile_fast.PILELoss` on the model's logits of all documents of the batch. Call `fit` with the training
    data before training, so that the teachers' weights are learned from all of it at once. With 0 < alpha < 1 it is returned as
    its two weighted terms, ``{"distillation": ..., "labels": ...}``, which the trainer adds up and logs each.

    Args:
        model: the `CrossEncoder` to train, with one output. Its `activation_fn` becomes the loss's, and is saved with it: what
            it predicts is what was trained.
        activation_fn: applied to the logits; None = the identity, which is right for ranking.
        mini_batch_size: (query, document) pairs per call of the model; None = as many as there are queries in the batch,
            0 or less = all at once. The loss does not depend on it.
        options: those of `pile_fast.PILELoss`; `reduction` is "mean" or "sum", `prior` may be a list of M numbers.

    Raises:
        ValueError: the model is no `CrossEncoder` or has several outputs, or a batch does not fit; the message names column and
            row. Never TypeError from a batch: the trainer would take it for a missing argument and run the forward again.

    >>> loss = PILELoss(CrossEncoder("microsoft/MiniLM-L12-H384-uncased", num_labels=1), alpha=0.7)  # doctest: +SKIP
    >>> loss.fit(dataset)  # doctest: +SKIP
    >>> CrossEncoderTrainer(model=loss.model, train_dataset=dataset, loss=loss).train()  # doctest: +SKIP
    """

    _model_class = "CrossEncoder"

    def __init__(
        self, model: Any, *, activation_fn: nn.Module | None = None, mini_batch_size: int | None = None, **options: Any
    ) -> None:
        if (outputs := getattr(model, "num_labels", 1)) != 1:
            raise ValueError(f"model: expected a CrossEncoder with num_labels=1, got num_labels={outputs}")
        super().__init__(model, activation_fn or nn.Identity(), **options)
        self.mini_batch_size = mini_batch_size

    def forward(
        self, inputs: list[list], labels: list[Tensor] | None = None, prompt: str | None = None, task: str | None = None
    ) -> Tensor | dict[str, Tensor]:
        """
        Args:
            inputs: the columns but for the labels: queries, their documents, teachers' logits.
            labels: per query (n,), or (n, 1 + M) with the teachers' logits; None = there are none.
            prompt, task: handed to the model's preprocessing.

        Returns:
            (), or the two terms as a dict.
        """
        try:
            return self._forward(inputs, labels, prompt, task)
        except (TypeError, ValueError) as error:
            raise ValueError(f"PILELoss: {error}") from error

    def _forward(self, inputs: list, labels: Any, prompt: Any, task: Any) -> Any:
        names = self._names(len(inputs), labels is not None)
        alpha = self.loss.options["alpha"]
        documents, batch = read_lists(inputs, labels, alpha, names)
        teachers, labels, cu_seqlens = self._targets(batch, inputs[0], self.model.device)
        logits = self._logits(inputs[0], documents, prompt, task)
        loss = self.loss(logits, teachers, labels, cu_seqlens=cu_seqlens)
        if not 0 < alpha < 1:
            return loss
        # The fused loss is what trains. The terms are for the log; they add up to it.
        options = {name: self.loss.options[name] for name in ("pair_weight", "pairwise", "backend")}
        kind = terms.find("label", "label_loss", self.loss.options["label_loss"])
        alone = pile_fast.ranking_loss(logits.detach(), labels, cu_seqlens=cu_seqlens, kind=kind, reduction="sum", **options)
        term = (1 - alpha) * alone
        if self.loss.options["reduction"] == "mean":
            term = term / _queries_that_count(teachers, labels, cu_seqlens, self.loss.prior, kind).clamp(min=1)
        return {"distillation": loss - term, "labels": term}

    def _read(self, inputs: list, labels: Any, names: Names) -> RankedBatch:
        return read_lists(inputs, labels, self.loss.options["alpha"], names)[1]

    def _logits(self, queries: list, documents: list[list], prompt: Any, task: Any) -> Tensor:
        """The model's logits of all pairs (D,), float32."""
        pairs = [(query, document) for query, docs in zip(queries, documents, strict=True) for document in docs]
        size = self.mini_batch_size or len(queries)
        if size <= 0:
            size = len(pairs)
        scores = []
        for begin in range(0, len(pairs), size):
            features = self.model.preprocess(pairs[begin : begin + size], prompt=prompt, task=task)
            scores.append(self.model(util.batch_to_device(features, self.model.device))["scores"].view(-1))
        return self.activation_fn(torch.cat(scores).float())

    def get_config_dict(self) -> dict:
        return {
            **super().get_config_dict(),
            "activation_fn": util.fullname(self.activation_fn),
            "mini_batch_size": self.mini_batch_size,
        }


class BiEncoderPILELoss(_PILELoss):
    """Distil several teachers into a `SentenceTransformer`; takes the place of `MarginMSELoss` and `DistillKLDivLoss`.

    Rows are theirs, a text per column: ``(query, positive, negative_1, ..., negative_n)``, as many documents in every row.

    ==========================  =========================================================================================
    ``label``, per row          content
    ==========================  =========================================================================================
    1 + n numbers               what one teacher says of each document (not differences); the labels are 1 for the first
                                document and 0 for the others. At alpha = 0: the labels
    (1 + n) × (1 + M) numbers   per document its label and M teachers' logits
    none                        at alpha = 0 only: the labels are 1, 0, ..., 0
    ==========================  =========================================================================================

    None or NaN = unlabelled, or not scored. The trainer takes the first of ``label``, ``labels``, ``score``, ``scores`` that it
    finds for this column. Rows with lists of documents: `pile_fast.trainer.PileTrainer` trains on them.

    The loss is that of `pile_fast.PILELoss` on `scale` times the similarity of query and document. Call `fit` with the training
    data before training, so that the teachers' weights are learned from all of it at once. It composes with `MatryoshkaLoss`.

    Args:
        model: the `SentenceTransformer` to train.
        similarity_fct: of embeddings (Q, hidden) and (Q, hidden), row by row, to (Q,); None = the model's own, by which it will
            be used: `model.similarity_pairwise`.
        scale: factor on the similarity. Cosines lie in [-1, 1], too close together for a pairwise loss.
        options: those of `pile_fast.PILELoss`; `reduction` is "mean" or "sum", `prior` may be a list of M numbers.

    Raises:
        ValueError: the model is no `SentenceTransformer`, or a batch does not fit; the message says how.

    >>> loss = BiEncoderPILELoss(SentenceTransformer("microsoft/mpnet-base")).fit(dataset)  # doctest: +SKIP
    >>> SentenceTransformerTrainer(model=loss.model, train_dataset=dataset, loss=loss).train()  # doctest: +SKIP
    """

    _model_class = "SentenceTransformer"

    def __init__(
        self,
        model: Any,
        *,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        scale: float = 20.0,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self.similarity_fct = similarity_fct or model.similarity_pairwise
        self.scale = number("scale", scale, low=0.0, open_low=True)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """
        Args:
            sentence_features: per column the tokenised texts of Q rows: queries, first documents, second documents, ...
            labels: (Q, 1 + n) or (Q, 1 + n, 1 + M), or None.

        Returns:
            ().
        """
        return self.compute_loss_from_embeddings(
            [self.model(features)["sentence_embedding"] for features in sentence_features], labels
        )

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """The loss () of columns of embeddings, (Q, hidden) each."""
        queries, *documents = (own.float() for own in embeddings)
        if len(documents) < 2:
            raise ValueError(f"documents: expected at least two columns of them after the query's, got {len(documents)}")
        names = self._names(len(embeddings), labels is not None)
        batch = read_tuples(len(queries), len(documents), labels, self.loss.options["alpha"], names)
        teachers, labels, cu_seqlens = self._targets(batch, None, queries.device)
        logits = torch.stack([self.similarity_fct(queries, own) for own in documents], 1).flatten()
        return self.loss(self.scale * logits, teachers, labels, cu_seqlens=cu_seqlens)

    def _read(self, inputs: list, labels: Any, names: Names) -> RankedBatch:
        return read_tuples(len(inputs[0]), len(inputs) - 1, labels, self.loss.options["alpha"], names)

    def get_config_dict(self) -> dict:
        return {
            **super().get_config_dict(),
            "similarity_fct": getattr(self.similarity_fct, "__name__", type(self.similarity_fct).__name__),
            "scale": self.scale,
        }


class _TakesNull:
    """A collator that takes None among the labels for NaN, if one of these losses trains the model."""

    equal_rows: bool
    preprocess_fn: Any
    valid_label_columns: Any

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        if features and getattr(getattr(self.preprocess_fn, "__self__", None), "pile_fast_labels", False):
            features = self.prepare(features)
        return super().__call__(features)  # type: ignore[misc]

    def prepare(self, features: list[dict[str, Any]]) -> list[dict[str, Any]]:
        label = next((name for name in self.valid_label_columns if name in features[0]), None)
        if label is None:
            return features
        values = without_null([row[label] for row in features], label, self.equal_rows)
        return [{**row, label: value} for row, value in zip(features, values, strict=True)]


_pairs: Any = CrossEncoderTrainer.data_collator_class
_columns: Any = SentenceTransformerTrainer.data_collator_class


class CrossEncoderCollator(_TakesNull, _pairs):
    equal_rows = False


class SentenceTransformerCollator(_TakesNull, _columns):
    equal_rows = True

    def prepare(self, features: list[dict[str, Any]]) -> list[dict[str, Any]]:
        features = super().prepare(features)
        for name, value in features[0].items():
            if name not in self.valid_label_columns and is_list_of_texts_or_numbers(value):
                raise ValueError(
                    f"column {name!r}: expected a text, got a list; SentenceTransformerTrainer takes a text per column, "
                    "(query, positive, negative_1, ...), and the teachers' logits in 'label'; PileTrainer takes lists"
                )
        return features


CrossEncoderTrainer.data_collator_class = CrossEncoderCollator
SentenceTransformerTrainer.data_collator_class = SentenceTransformerCollator


def _queries_that_count(
    teachers: Tensor, labels: Tensor, cu_seqlens: Tensor, prior: Tensor | None, label_loss: terms.Term
) -> Tensor:
    """What the mean of `pile_fast.pile_loss` divides by, () on the device; reading it would stall the stream."""
    lengths = cu_seqlens.diff()
    query = torch.repeat_interleave(lengths, output_size=len(labels)).long()
    present = ~teachers.isnan() if prior is None else ~teachers.isnan() & (prior > 0)
    scored = torch.zeros(len(lengths), device=labels.device).index_add_(0, query, present.any(1).float())
    labels, infinity = labels.float(), torch.full((len(lengths),), torch.inf, device=labels.device)
    highest = (-infinity).scatter_reduce(0, query, labels.nan_to_num(-torch.inf), "amax")
    lowest = infinity.scatter_reduce(0, query, labels.nan_to_num(torch.inf), "amin")
    return ((scored > 1) | has_label_loss(label_loss, highest, lowest)).sum()


def _check_teachers(teachers: np.ndarray, lengths: list[int]) -> None:
    """Warn of teachers that have nothing to teach, by one batch: absent, constant, or mostly ties (saturated scores)."""
    ends = list(itertools.accumulate(lengths, initial=0))
    for teacher, logits in enumerate(teachers.T, 1):
        lists = [logits[begin:end] for begin, end in itertools.pairwise(ends)]
        lists = [scored for scored in (values[~np.isnan(values)] for values in lists) if len(scored) > 1]
        pairs = sum(len(scored) * (len(scored) - 1) / 2 for scored in lists)
        ties = sum((counts * (counts - 1) / 2).sum() for _, counts in (np.unique(v, return_counts=True) for v in lists))
        problem = None
        if not pairs:
            problem = "scored no two documents of any query"
        elif ties == pairs:
            problem = "gives all documents of a query the same logit"
        elif ties > pairs / 2:
            problem = f"ties {ties / pairs:.0%} of the pairs of documents: saturated? Logits teach more than probabilities"
        if problem:
            logger.warning("PILELoss: in the first batch teacher %d of %d %s.", teacher, teachers.shape[1], problem)
