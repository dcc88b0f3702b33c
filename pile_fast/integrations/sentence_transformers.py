"""PILE as a loss for sentence-transformers' `CrossEncoderTrainer`."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import torch
from torch import Tensor, nn

import pile_fast
from pile_fast.integrations import import_library

util = import_library("sentence_transformers.util", "sentence-transformers")

logger = logging.getLogger(__name__)


class PILELoss(nn.Module):
    """Distil several teachers into a `CrossEncoder`; takes the place of `LambdaLoss` and its kin.

    A training row holds a query, its documents, their labels, and what the teachers said. Lists may have any length.

    ====================  ===============================================================================================
    column                content
    ====================  ===============================================================================================
    first                 the query
    second                n documents
    third, fourth, ...    teachers' logits: n × M, or n for a single teacher; None or NaN = did not score this document
    ``labels``            n labels, larger is better, NaN = unlabelled. Or, in place of further columns, n × (1 + M): label
                          and teachers' logits
    ====================  ===============================================================================================

    Names are free but for the labels' one: the trainer takes the first of ``label``, ``labels``, ``score``, ``scores`` that it
    finds. A column ``scores`` of teachers' logits beside ``labels`` is fine; without ``labels`` it would be taken for them.

    The loss is `pile_fast.pile_loss` on the model's logits of all documents of the batch. With 0 < alpha < 1 it is returned as
    its two weighted terms, ``{"distillation": ..., "labels": ...}``, which the trainer adds up and logs each.

    Args:
        model: the `CrossEncoder` to train, with one output.
        activation_fn: applied to the logits; None = the identity, which is right for ranking.
        mini_batch_size: (query, document) pairs per call of the model; None = as many as there are queries in the batch,
            0 or less = all at once. The loss does not depend on it.
        options: those of `pile_fast.PILELoss`; `reduction` is "mean" or "sum", `prior` may be a list of M numbers.

    Raises:
        ValueError: the model has several outputs, or a batch does not fit; the message names what. Never TypeError from a
            batch: the trainer would take it for a missing argument and run the forward again.

    >>> loss = PILELoss(CrossEncoder("microsoft/MiniLM-L12-H384-uncased", num_labels=1), alpha=0.7)  # doctest: +SKIP
    >>> CrossEncoderTrainer(model=loss.model, train_dataset=dataset, loss=loss).train()  # doctest: +SKIP
    """

    def __init__(self, model, *, activation_fn: nn.Module | None = None, mini_batch_size: int | None = None, **options):
        super().__init__()
        if model.num_labels != 1:
            raise ValueError(f"model: expected a CrossEncoder with num_labels=1, got num_labels={model.num_labels}")
        if options.get("reduction") == "none":
            raise ValueError("reduction: expected 'mean' or 'sum', got 'none'; the trainer wants one number")
        if options.get("prior") is not None:
            options["prior"] = torch.as_tensor(options["prior"], dtype=torch.float32)
        self.model = model  # the trainer puts the DDP or compiled model in its place, by this name
        self.activation_fn = activation_fn or nn.Identity()
        self.mini_batch_size = mini_batch_size
        self.loss = pile_fast.PILELoss(**options)
        self._checked_teachers = False

    def forward(
        self, inputs: list[list], labels: list[Tensor], prompt: str | None = None, task: str | None = None
    ) -> Tensor | dict[str, Tensor]:
        """
        Args:
            inputs: the columns but for the labels: queries, their documents, teachers' logits.
            labels: per query (n,), or (n, 1 + M) with the teachers' logits.
            prompt, task: handed to the model's preprocessing.

        Returns:
            (), or the two terms as a dict.
        """
        try:
            return self._forward(inputs, labels, prompt, task)
        except TypeError as error:
            raise ValueError(f"PILELoss: {error}") from error

    def _forward(self, inputs, labels, prompt, task):
        if len(inputs) < 2:
            raise ValueError(f"inputs: expected queries, documents and teachers' logits, got {len(inputs)} column(s)")
        queries, documents, *columns = inputs
        lengths = [len(docs) for docs in documents]
        labels, device = _check_labels(labels, lengths, bool(columns)), self.model.device
        teachers = _flatten_columns(columns, lengths) if columns else np.empty((sum(lengths), 0), np.float32)
        teachers, cu_seqlens = _to_device(teachers, np.cumsum([0, *lengths], dtype=np.int32), device)
        labels = torch.cat([own for own in labels if len(own)]).to(device)
        if not columns:
            labels, teachers = labels[:, 0], labels[:, 1:].float()
        if not self._checked_teachers:
            self._checked_teachers = True
            _check_teachers(teachers.cpu().numpy(), lengths)

        logits = self._logits(queries, documents, prompt, task)
        loss = self.loss(logits, teachers, labels, cu_seqlens=cu_seqlens)
        alpha = self.loss.options["alpha"]
        if not 0 < alpha < 1:
            return loss
        # The fused loss is what trains. The terms are for the log; they add up to it.
        options = {name: self.loss.options[name] for name in ("pair_weight", "pairwise", "backend")}
        term = (1 - alpha) * pile_fast.pairwise_logistic_loss(
            logits.detach(), labels, cu_seqlens=cu_seqlens, reduction="sum", **options
        )
        if self.loss.options["reduction"] == "mean":
            term = term / _queries_with_a_pair(teachers, labels, cu_seqlens, self.loss.prior).clamp(min=1)
        return {"distillation": loss - term, "labels": term}

    def _logits(self, queries, documents, prompt, task) -> Tensor:
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
        """What the model card says of the loss."""
        prior = self.loss.prior
        return {
            **self.loss.options,
            "prior": None if prior is None else prior.tolist(),
            "activation_fn": util.fullname(self.activation_fn),
            "mini_batch_size": self.mini_batch_size,
        }

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


def _check_labels(labels: list[Tensor], lengths: list[int], columns: bool) -> list[Tensor]:
    """The labels, if each query has a row per document and teachers come from one place; reads shapes only."""
    if labels is None:
        raise ValueError("labels: expected a column named label, labels, score or scores (NaN = unlabelled), got none")
    wanted = "(n,) beside columns of teachers' logits" if columns else "(n, 1 + M), or further columns of teachers' logits"
    if isinstance(labels, Tensor):
        raise ValueError(f"labels: expected per query {wanted}; got one number per query")
    if not sum(lengths):
        raise ValueError("inputs: expected at least one document in a batch, got none")
    for query, (n, own) in enumerate(zip(lengths, labels, strict=True)):
        if len(own) != n:
            raise ValueError(f"labels: expected {n}, one per document, for query {query} of the batch, got {len(own)}")
        if n and (own.dim() != (1 if columns else 2) or not columns and own.shape[1] < 2):
            raise ValueError(f"labels: expected {wanted}; query {query} of the batch has {tuple(own.shape)}")
    if not columns and len(teachers := {own.shape[1] - 1 for own in labels if len(own)}) > 1:
        raise ValueError(f"labels: expected the same number of teachers for every query, got {sorted(teachers)}")
    return labels


def _flatten_columns(columns: list[list], lengths: list[int]) -> np.ndarray:
    """Teachers' logits of all documents (D, M), float32, NaN for None."""
    flat = []
    for number, column in enumerate(columns, 3):
        rows = []
        for query, (n, values) in enumerate(zip(lengths, column, strict=True)):
            at = f"column {number}, query {query} of the batch"
            try:
                matrix = np.asarray(values, dtype=np.float32)  # None becomes NaN
            except (TypeError, ValueError) as error:
                raise ValueError(f"{at}: expected teachers' logits, n or n × M numbers or None; {error}") from error
            if matrix.ndim not in (1, 2) or len(matrix) != n:
                raise ValueError(f"{at}: expected teachers' logits ({n},) or ({n}, M), got {matrix.shape}")
            if np.isinf(matrix).any():
                raise ValueError(f"{at}: expected finite logits (None or NaN = not scored), got an infinite one")
            if n:
                rows.append(matrix.reshape(n, -1))
        if len(teachers := {matrix.shape[1] for matrix in rows}) > 1:
            raise ValueError(f"column {number}: expected the same number of teachers for every query, got {sorted(teachers)}")
        flat.append(np.concatenate(rows))
    return np.concatenate(flat, 1)


def _to_device(teachers: np.ndarray, cu_seqlens: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both in one copy, the integers as bits."""
    buffer = torch.from_numpy(np.concatenate([teachers.ravel(), cu_seqlens.view(np.float32)])).to(device)
    values, bits = buffer.split([teachers.size, cu_seqlens.size])
    return values.view(teachers.shape), bits.view(torch.int32)


def _queries_with_a_pair(teachers: Tensor, labels: Tensor, cu_seqlens: Tensor, prior: Tensor | None) -> Tensor:
    """What the mean of `pile_fast.pile_loss` divides by, () on the device; reading it would stall the stream."""
    lengths = cu_seqlens.diff()
    query = torch.repeat_interleave(lengths, output_size=len(labels)).long()
    present = ~teachers.isnan() if prior is None else ~teachers.isnan() & (prior > 0)
    scored = torch.zeros(len(lengths), device=labels.device).index_add_(0, query, present.any(1).float())
    labels, infinity = labels.float(), torch.full((len(lengths),), torch.inf, device=labels.device)
    highest = (-infinity).scatter_reduce(0, query, labels.nan_to_num(-torch.inf), "amax")
    lowest = infinity.scatter_reduce(0, query, labels.nan_to_num(torch.inf), "amin")
    return ((scored > 1) | (highest > lowest)).sum()


def _check_teachers(teachers: np.ndarray, lengths: list[int]) -> None:
    """Warn of teachers that have nothing to teach, by one batch: absent, constant, or mostly ties (saturated scores)."""
    ends = list(itertools.accumulate(lengths, initial=0))
    for number, logits in enumerate(teachers.T, 1):
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
            logger.warning("PILELoss: in the first batch teacher %d of %d %s.", number, teachers.shape[1], problem)
