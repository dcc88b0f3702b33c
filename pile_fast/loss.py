"""`PILELoss`: the loss as a module that keeps its options and, shared by all queries, the teachers' weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self, Unpack

from pile_fast import backends, shared
from pile_fast.backends import check_name
from pile_fast.batch import RankingBatch
from pile_fast.checks import count, positive_count
from pile_fast.functional import check_fits, pile_loss, pile_loss_and_pulls
from pile_fast.options import EnsembleOptions, LossOptions, PILEKeywords, documented, pile_options, table

# Of weights that all queries share. Their sizes follow the number of teachers, which the first batch tells.
_STATE = ("exponents", "weights", "pending")


class PILELoss(torch.nn.Module):
    r"""PILE as a drop-in loss: ensemble the teachers under label supervision, distil the ensemble into the student.

    Call it with ``(student_logits, teacher_logits, labels, mask=None, cu_seqlens=None, weights=None, query_weights=None)``,
    student first; shapes, results and
    errors are those of `pile_fast.pile_loss`, and so are the options and their defaults, checked when the module is built.

    With ``granularity="shared"``, the default, the module learns one weight per teacher for all queries, and the target of any
    query, labelled or not, is the teachers' mean by these weights:

    - `fit` learns them from the training data before the first step; they stay.
    - Without it each call in training mode takes a step of the rule with its batch. `eval()` freezes them. In distributed
      training the batches of all processes count, so that every process has the same weights to the bit.
    - ``prior=weights, iterations=0`` uses the weights given, and learns nothing.

    State, in `state_dict`: `weights` (M,), their `exponents` (M,), `labelled_queries`, and whether they are `fitted`.

    Args:
        prior: (M,) weights to start from, see `pile_fast.pile_ensemble`. A buffer, which follows the module to its device.
        labelled_queries: how many different queries of the training data have labels, for `shrinkage` while weights are
            learned step by step; None = as many as came by in epoch 0, see `set_epoch`. `fit` counts them.
        accumulation_steps: calls that make up an optimiser step. Their pulls are added, and the weights take one step.
        backend: "auto" or a name from `pile_fast.available_backends()`.
        {options}

    >>> import torch, pile_fast
    >>> _ = torch.manual_seed(0)
    >>> labels = torch.randint(0, 3, (8, 20))
    >>> teachers = torch.stack([labels.float(), torch.randn(8, 20)], -1)  # one knows, one guesses
    >>> loss_fn = pile_fast.PILELoss(alpha=0.7).fit([(teachers, labels)])
    >>> bool(loss_fn.weights[0] > 0.8)
    True
    >>> student = torch.randn(8, 20, requires_grad=True)
    >>> loss_fn(student, teachers, labels).backward()
    """

    prior: Tensor | None
    exponents: Tensor
    weights: Tensor
    pending: Tensor
    labelled_queries: Tensor
    fitted: Tensor

    @documented(LossOptions, EnsembleOptions)
    def __init__(
        self, *, prior: Tensor | None = None, labelled_queries: int | None = None, accumulation_steps: int = 1,
        backend: str = "auto", **options: Unpack[PILEKeywords],
    ) -> None:  # fmt: skip
        super().__init__()
        self._ensemble, of_loss = pile_options(**options)
        self._given = options
        self._backend = check_name(backend)
        self.accumulation_steps = positive_count("accumulation_steps", accumulation_steps)
        shared_weights = self._ensemble.granularity == "shared"
        self._learns = shared_weights and self._ensemble.iterations > 0 and of_loss.alpha > 0
        # With weights from here a call has nothing left to iterate.
        self._with_weights: PILEKeywords = {**options, "iterations": 0}
        known = labelled_queries is not None
        self._counts = not known
        self.register_buffer("prior", prior)
        self.register_buffer(
            "labelled_queries", torch.tensor(positive_count("labelled_queries", labelled_queries) if known else 0)
        )
        self.register_buffer("fitted", torch.tensor(False))
        self._frozen = False
        for name in _STATE:
            self.register_buffer(name, torch.empty(0))

    @property
    def options(self) -> dict[str, Any]:
        """A copy of all options, given or not."""
        defaults = {name: row.default for name, row in table(LossOptions, EnsembleOptions).items()}
        by_granularity = {"iterations": self._ensemble.iterations, "step_size": self._ensemble.step_size}
        return {**defaults, **self._given, **by_granularity, "backend": self._backend}

    @property
    def learns(self) -> bool:
        """Whether there are weights to learn: those that all queries share, for a distillation that counts."""
        return self._learns

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        query_weights: Tensor | None = None,
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
        prior, options = self.prior, self._given
        if self._learns:
            self._start(student_logits, teacher_logits)
            prior, options = self.weights if len(self.weights) else self.prior, self._with_weights
            if self.training and not self._frozen:
                loss, pulls = pile_loss_and_pulls(
                    student_logits, teacher_logits, labels, mask, cu_seqlens, prior, self._backend, options,  # type: ignore[arg-type]
                    weights, query_weights,
                )  # fmt: skip
                self._step(pulls)
                return loss
        return pile_loss(
            student_logits, teacher_logits, labels,  # type: ignore[arg-type]  # None: it says what is missing
            mask=mask, cu_seqlens=cu_seqlens, prior=prior, weights=weights, query_weights=query_weights,
            backend=self._backend, **options,
        )  # fmt: skip

    def fit(self, batches: Iterable[Any], *, sharded: bool = True) -> Self:
        """Learn the weights from labelled queries, in place of what was learned before; then they stay.

        All labelled queries are held in memory at once, with what the fit makes of them some 200 bytes a document (4 teachers).

        Args:
            batches: a data loader, or any iterable, of batches: a mapping with "teacher_logits" (Q, N, M) or (D, M),
                "labels" (Q, N) or (D,) and perhaps "mask" or "cu_seqlens" (one that stands under "labels", as the collators
                of `pile_fast.data.collator` make it, will do), or a tuple (teacher_logits, labels[, mask[, cu_seqlens]]).
                None and queries without labels are passed over.
            sharded: in distributed training, whether each process has a share of the data here, or all of it. Shares are
                gathered, so all processes have to call it.

        Returns:
            The module.

        Raises:
            TypeError, ValueError: a batch does not fit; the message says which one and names the argument.
            RuntimeError: the options have no weights that all queries share.

        Warns:
            UserWarning: no query has two documents whose labels differ; the weights are the mean's, or `prior`.
        """
        if not self._learns:
            raise RuntimeError(
                "PILELoss.fit: nothing to fit; it learns weights that all queries share: granularity='shared', "
                "iterations > 0 and alpha > 0"
            )
        data = shared.collect(batches, sharded=sharded)
        if data is not None:
            given = [None if tensor is None else tensor.to(self.fitted.device) for tensor in data]
            batch = RankingBatch(teacher_logits=given[0], labels=given[1], cu_seqlens=given[2], prior=self.prior)
            check_fits(batch, self._ensemble)
            by = backends.select(self._backend, batch, self._ensemble, None)
            exponents, _ = shared.fit(backends.load(by), batch, self._ensemble, False)
            self._begin(batch.num_teachers)
            self.exponents.copy_(exponents)
            self.weights.copy_(shared.weights_of(exponents, self.prior))
            self.labelled_queries.fill_(batch.num_queries)
        self.fitted.fill_(True)
        self._frozen = True
        return self

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, counted from 0: labelled queries are counted in the first, as later ones bring the same."""
        self._counts = self._counts and count("epoch", epoch) == 0

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def _start(self, student_logits: Tensor, teacher_logits: Tensor) -> None:
        """The state for so many teachers: at the first call, later held against it. A wrong call is left to the checks."""
        for tensor in (student_logits, teacher_logits):
            if not isinstance(tensor, Tensor) or tensor.is_nested:
                return
        if teacher_logits.dim() != student_logits.dim() + 1:
            return
        teachers, known = teacher_logits.shape[-1], self.exponents.shape[0]
        if known == 0:
            self._begin(teachers)
        elif known != teachers:
            raise ValueError(f"teacher_logits: expected {known} teachers, whose weights this loss has, got {teachers}")

    def _begin(self, teachers: int) -> None:
        """The weights to start from."""
        if self.prior is not None and self.prior.shape != (teachers,):
            return  # the checks say it
        zeros = torch.zeros(teachers, device=self.fitted.device)
        self.exponents, self.pending = zeros, zeros.new_zeros(2 * teachers + 2)
        self.weights = shared.weights_of(zeros, self.prior)

    @torch.no_grad()
    def _step(self, pulls: Tensor) -> None:
        """A step of the rule with these pulls, or with those of `accumulation_steps` calls."""
        total = shared.over_processes(shared.totals(pulls.detach()))
        teachers = pulls.shape[-1]
        if self._counts:
            self.labelled_queries += total[2 * teachers].to(self.labelled_queries.dtype)
        if self.accumulation_steps > 1:
            total = self._accumulate(total)
        exponents = shared.step(self.exponents, total, self.labelled_queries, self._ensemble)
        self.exponents.copy_(exponents)
        self.weights.copy_(shared.weights_of(exponents, self.prior))

    def _accumulate(self, total: Tensor) -> Tensor:
        """What came in since the last step; zeros while calls of the present one are missing.

        `pending` counts the calls where `shared.totals` has the losses.
        """
        total = torch.cat([total[:-1], total.new_ones(1)]) + self.pending
        due = total[-1] >= self.accumulation_steps
        self.pending.copy_(torch.where(due, 0.0, total))
        return torch.where(due, total, 0.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """To another device, not to another dtype: halves would round the steps away."""
        kept = {name: getattr(self, name) for name in _STATE}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            setattr(self, name, tensor.to(getattr(self, name).device))
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        for name in _STATE:
            if isinstance(tensor := state_dict.get(prefix + name), Tensor):
                setattr(self, name, getattr(self, name).new_empty(tensor.shape))
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._frozen = bool(self.fitted)
