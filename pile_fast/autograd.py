"""The registered ops and their autograd: the only module that knows either.

Three ops, `pile_fast::ensemble`, `pile_fast::pair_loss` and `pile_fast::pile_loss`, take flat arguments (tensors, options,
flags, the backend's name) and have fakes, so that `torch.compile(fullgraph=True)` sees one node.
Eager calls skip the dispatcher and go to the backend directly; docs/performance.md has what that saves per call.

The student's gradient is computed with the loss, when the student requires grad and only then; backward multiplies it by
the upstream gradient.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pile_fast import backends, shared, terms
from pile_fast.batch import RankingBatch
from pile_fast.options import EnsembleOptions, LossOptions, Options
from pile_fast.terms import Term

_library = torch.library.Library("pile_fast", "DEF")


class _Op:
    """A registered op: tensors of a `RankingBatch`, sets of options, flags, the backend's name.

    Args:
        name: of the op, and of the backends' function (batch, *options, *flags) that computes it.
        tensors: names of the batch's tensors, with their types in the schema.
        options: the sets.
        flags: names of bools.
        outputs: how many tensors it returns.
        fake: (batch, *options, *flags) → outputs without values, of the right shapes and dtypes.
    """

    def __init__(
        self, name: str, tensors: dict[str, str], options: list[Options], flags: list[str], outputs: int,
        fake: Callable[..., tuple[Tensor, ...]],
    ):  # fmt: skip
        self.name, self.tensors, self.options, self.flags = name, list(tensors), options, flags
        arguments = [f"{kind} {tensor}" for tensor, kind in tensors.items()]
        for k, options_set in enumerate(options):
            arguments += _schema(options_set, prefix="loss_" if k > 0 else "")
        arguments += [*(f"bool {flag}" for flag in flags), "str backend"]
        _library.define(f"{name}({', '.join(arguments)}) -> ({', '.join(['Tensor'] * outputs)})")
        _library.impl(name, self._compute, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pile_fast::{name}", lambda *arguments: fake(*self._read(arguments)[1:]), lib=_library)
        self._op = getattr(torch.ops.pile_fast, name)

    def __call__(self, batch: RankingBatch, options: tuple[Any, ...], flags: tuple[bool, ...], backend: str) -> Any:
        """Tensors that hold values go to the backend directly, past the dispatcher. What stands in for others (in tracers, fake
        modes, subclasses) must go through the op, which knows what to do with each of them."""
        if batch.concrete:
            return self._on(backend, batch, options, flags)
        arguments = [getattr(batch, name) for name in self.tensors]
        for options_set in options:
            arguments += flat(options_set)
        return self._op(*arguments, *flags, backend)

    def _read(self, arguments: tuple[Any, ...]) -> list[Any]:
        """[backend, batch, *options, *flags] from an op's arguments."""
        *rest, backend = arguments
        left = iter(rest)
        tensors = {name: next(left) for name in self.tensors}
        if "student_logits" in tensors:
            tensors["student_logits"] = tensors["student_logits"].detach()
        options = [_unflat(options_set, left) for options_set in self.options]
        return [backend, RankingBatch(**tensors), *options, *left]

    def _compute(self, *arguments: Any) -> Any:
        backend, batch, *rest = self._read(arguments)
        return self._on(backend, batch, rest[: len(self.options)], rest[len(self.options) :])

    def _on(self, backend: str, batch: RankingBatch, options: Sequence[Any], flags: Sequence[bool]) -> Any:
        module = backends.load(backend)
        if getattr(options[0], "granularity", "") == "shared":
            return getattr(shared, self.name)(module, batch, *options, *flags)
        return getattr(module, self.name)(batch, *options, *flags)


def _schema(options: Options, prefix: str) -> list[str]:
    """The arguments of an op that carry a set of options: a term is its key and its numbers."""
    arguments = []
    for name, hint in typing.get_type_hints(options).items():
        if hint is Term:
            arguments += [f"str {prefix}{name}", f"float[] {prefix}{name}_numbers"]
        else:
            arguments.append(f"{hint.__name__} {prefix}{name}")
    return arguments


def flat(options: EnsembleOptions | LossOptions) -> list[Any]:
    """A set of options as an op's arguments, in the order of its schema."""
    arguments: list[Any] = []
    for value in options:
        arguments += (value.key, value.numbers) if isinstance(value, Term) else (value,)
    return arguments


def _unflat(options: Options, arguments: Iterator[Any]) -> Any:
    hints = typing.get_type_hints(options).values()
    values: list[Any] = [terms.by_key(next(arguments), next(arguments)) if hint is Term else next(arguments) for hint in hints]
    return options(*values)


def _fake_ensemble(
    batch: RankingBatch, options: EnsembleOptions, return_weights: bool, return_trace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    teachers = batch.teacher_logits
    of_weights = {"document": teachers.shape, "query": (batch.num_queries, batch.num_teachers), "shared": (batch.num_teachers,)}
    weights = of_weights[options.granularity] if return_weights else (0,)
    trace: tuple[int, ...] = (options.iterations + 1 if return_trace else 0,)
    if options.granularity != "shared":
        trace = (batch.num_queries, *trace)
    return (
        teachers.new_empty(teachers.shape[:-1], dtype=batch.dtype),
        teachers.new_empty(weights, dtype=batch.dtype),
        teachers.new_empty(trace, dtype=batch.dtype),
    )


def _fake_loss(batch: RankingBatch, options: LossOptions, with_gradient: bool) -> tuple[Tensor, Tensor]:
    student = batch.student_logits
    loss = student.new_empty((batch.num_queries,) if options.reduction == "none" else (), dtype=batch.dtype)
    return loss, student.new_empty(student.shape if with_gradient else (0,))


def _fake_pile_loss(
    batch: RankingBatch, of_ensemble: EnsembleOptions, of_loss: LossOptions, with_gradient: bool, with_pulls: bool
) -> tuple[Tensor, Tensor, Tensor]:
    pulls = (batch.num_queries, batch.num_teachers) if with_pulls else (0,)
    return *_fake_loss(batch, of_loss, with_gradient), batch.teacher_logits.new_empty(pulls, dtype=batch.dtype)


_ensemble = _Op(
    "ensemble",
    {"teacher_logits": "Tensor", "labels": "Tensor", "mask": "Tensor?", "cu_seqlens": "Tensor?", "prior": "Tensor?"},
    [EnsembleOptions], ["return_weights", "return_trace"], 3, _fake_ensemble,
)  # fmt: skip
_pair_loss = _Op(
    "pair_loss",
    {
        "student_logits": "Tensor", "target_logits": "Tensor?", "labels": "Tensor?", "mask": "Tensor?", "cu_seqlens": "Tensor?",
        "weights": "Tensor?", "query_weights": "Tensor?",
    },
    [LossOptions], ["with_gradient"], 2, _fake_loss,
)  # fmt: skip
_pile_loss = _Op(
    "pile_loss",
    {
        "student_logits": "Tensor", "teacher_logits": "Tensor", "labels": "Tensor", "mask": "Tensor?", "cu_seqlens": "Tensor?",
        "prior": "Tensor?", "weights": "Tensor?", "query_weights": "Tensor?",
    },
    [EnsembleOptions, LossOptions], ["with_gradient", "with_pulls"], 3, _fake_pile_loss,
)  # fmt: skip


def ensemble(
    batch: RankingBatch, options: EnsembleOptions, return_weights: bool, return_trace: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, weights, trace) of the ensemble; outputs not asked for are empty."""
    outputs: tuple[Tensor, Tensor, Tensor] = _ensemble(batch, (options,), (return_weights, return_trace), backend)
    return outputs


def pair_loss(batch: RankingBatch, options: LossOptions, backend: str) -> Tensor:
    """The student's loss against `batch.target_logits` and `batch.labels`."""
    return _loss(_pair_loss, batch, (options,), (), backend)[0]


def pile_loss(
    batch: RankingBatch, of_ensemble: EnsembleOptions, of_loss: LossOptions, backend: str, with_pulls: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The student's loss against the PILE ensemble of `batch.teacher_logits`, and the queries' pulls if asked for."""
    outputs = _loss(_pile_loss, batch, (of_ensemble, of_loss), (with_pulls,), backend)
    return outputs[0], outputs[1] if with_pulls else None


def _loss(op: _Op, batch: RankingBatch, options: tuple[Any, ...], flags: tuple[bool, ...], backend: str) -> tuple[Tensor, ...]:
    """The loss, and behind it what the flags ask for."""
    if batch.student_logits.requires_grad and torch.is_grad_enabled():
        outputs: tuple[Tensor, ...] = _Loss.apply(batch.student_logits, op, batch, options, flags, backend)  # type: ignore[no-untyped-call]
        return outputs
    loss, _, *others = op(batch, options, (False, *flags), backend)
    return loss, *others


class _Loss(torch.autograd.Function):
    """A loss whose gradient was computed with it."""

    @staticmethod
    def forward(
        ctx: Any, student_logits: Tensor, op: _Op, batch: RankingBatch, options: tuple[Any, ...], flags: tuple[bool, ...],
        backend: str,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        loss, gradient, *others = op(batch, options, (True, *flags), backend)
        ctx.save_for_backward(gradient, student_logits, batch.cu_seqlens)
        if not any(flags):
            return (loss,)
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        gradient, student_logits, cu_seqlens = ctx.saved_tensors
        if upstream.dim() == 1:  # one loss per query
            upstream = upstream.unsqueeze(1) if cu_seqlens is None else _per_document(upstream, cu_seqlens, gradient)
        gradient = gradient * upstream
        if gradient.dtype is not student_logits.dtype:  # a half gradient times one float32 per query
            gradient = gradient.to(student_logits.dtype)
        if torch.is_grad_enabled():  # create_graph=True
            gradient = _OnceDifferentiable.apply(gradient, student_logits)  # type: ignore[no-untyped-call]
        return gradient, None, None, None, None, None


class _OnceDifferentiable(torch.autograd.Function):
    """An identity whose backward raises. `once_differentiable` would treat the gradient as a constant, without a word,
    whenever the upstream gradient is one."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, student_logits: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "pile_fast losses are differentiable once: their gradient is computed by a kernel, not recorded. "
            "For second derivatives differentiate pile_fast.reference.pair_loss."
        )


def _per_document(per_query: Tensor, cu_seqlens: Tensor, like: Tensor) -> Tensor:
    """(Q,) → (D,): each document its query's value; documents of no query get the last one's."""
    if per_query.shape[0] == 0:
        return like.new_zeros(())
    documents = torch.arange(like.shape[0], device=like.device, dtype=cu_seqlens.dtype)
    return per_query[torch.searchsorted(cu_seqlens[1:-1], documents, right=True)]
