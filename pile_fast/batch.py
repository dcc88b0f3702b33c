"""A batch of ranked lists, padded or packed, and every check on the tensors a user hands over.

Two layouts describe the same thing, queries with their documents:

=========  ======================  =====================  ==================================
layout     per document            per document × teacher  which slots hold a document
=========  ======================  =====================  ==================================
padded     (Q, N)                  (Q, N, M)              `mask` (Q, N) bool; None = all
packed     (D,)                    (D, M)                 `cu_seqlens` (Q + 1,) int32 / int64
=========  ======================  =====================  ==================================

In the packed layout query q owns the documents `cu_seqlens[q] : cu_seqlens[q + 1]`; documents past `cu_seqlens[-1]`
belong to no query: they get no ensemble logit and a zero gradient.
"""

from __future__ import annotations

import copy
import math
from typing import NoReturn, overload

import torch
from torch import Tensor
from torch._C import _is_tracing, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

LOGIT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGER_LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
LABEL_DTYPES = LOGIT_DTYPES + _INTEGER_LABELS
# PyTorch itself computes little with these: labels of theirs become the next wider integers.
_UNSIGNED_LABELS = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
_INDEX_DTYPES = (torch.int32, torch.int64)
# Labels are compared as float64, which tells integers apart up to here.
LABEL_LIMIT = 2**53
# Plain memory; subclasses are if they do not dispatch on their own, as fake and distributed tensors do.
_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype the arithmetic runs in: float64 if any logit tensor is float64, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32


class RankingBatch:
    """Checked tensors of one call.

    Build it, then read the tensors, `packed`, `num_queries`, `num_teachers`, `slots` (N or D), `device`, `dtype` (of the
    arithmetic: float64 if any logits are, else float32) and `concrete`: whether the tensors hold values that can be read
    here and now, or stand for others in a tracer, a fake mode or on the meta device.

    Args:
        student_logits: (Q, N) or (D,), float; the only tensor that may carry a gradient.
        teacher_logits: (Q, N, M) or (D, M), float; NaN or ±inf = this teacher did not score this document.
        target_logits: (Q, N) or (D,), float; NaN or ±inf = no target for this document.
        labels: (Q, N) or (D,), float or integer, |label| < 2^53 if integer; larger is better, NaN = unlabelled.
        mask: (Q, N) bool, True = the slot holds a document. Padded layout only.
        cu_seqlens: (Q + 1,) int32 or int64, starts of the queries. Its presence selects the packed layout.
        prior: (M,) or (Q, M), float >= 0 and finite, some > 0 for each query: the teachers' weights to start from.
        weights: (Q, N) or (D,), float >= 0 and finite: what a document counts in the loss.
        query_weights: (Q,), float >= 0 and finite: what a query counts in it.

    Raises:
        TypeError: an argument is not a dense tensor, or has the wrong dtype.
        RuntimeError: the call is inside a `torch.func` transform, or a tensor carries a forward-mode tangent.
        ValueError: a shape, device or value does not fit; the message names the argument, what is wanted and what was given.
    """

    __slots__ = (
        "student_logits", "teacher_logits", "target_logits", "labels", "mask", "cu_seqlens", "prior",
        "weights", "query_weights",
        "packed", "num_queries", "num_teachers", "slots", "device", "dtype", "concrete", "_compiling",
    )  # fmt: skip

    # None where the call has none. Their types do not say so: whoever computes a term or an ensemble was given its tensors.
    student_logits: Tensor
    teacher_logits: Tensor
    target_logits: Tensor
    labels: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    prior: Tensor | None
    weights: Tensor | None
    query_weights: Tensor | None

    def __init__(
        self,
        *,
        student_logits: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        target_logits: Tensor | None = None,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        prior: Tensor | None = None,
        weights: Tensor | None = None,
        query_weights: Tensor | None = None,
    ):
        self.packed = packed = cu_seqlens is not None
        self._compiling = torch.compiler.is_compiling()
        if not self._compiling:
            if peek_interpreter_stack() is not None:
                self._refuse_transform(student_logits, teacher_logits)
            if forward_ad._current_level >= 0:
                self._refuse_tangents(student_logits=student_logits, teacher_logits=teacher_logits, target_logits=target_logits)

        # The student, else the teachers, fix shape and device; the others are held against them.
        wide = False
        self.num_teachers = 0
        shape: torch.Size | None = None
        if student_logits is not None:
            student_logits, shape, dtype = self._check_logits("student_logits", student_logits, 1 if packed else 2)
            device, first, wide = student_logits.device, "student_logits", dtype is torch.float64
        if teacher_logits is not None:
            teacher_logits, own, dtype = self._check_logits("teacher_logits", teacher_logits, 2 if packed else 3)
            wide = wide or dtype is torch.float64
            if teacher_logits.requires_grad:
                self._refuse_grad("teacher_logits")
            self.num_teachers = own[-1]
            if self.num_teachers == 0:
                raise ValueError(f"teacher_logits: expected at least one teacher, got {tuple(own)}")
            if shape is None:
                shape, device, first = own[:-1], teacher_logits.device, "teacher_logits"
            elif own[:-1] != shape or teacher_logits.device != device:
                self._mismatch("teacher_logits", teacher_logits, shape, device, first)
        if shape is None:
            raise TypeError("student_logits: expected a torch.Tensor, got None")
        if target_logits is not None:
            target_logits, own, dtype = self._check_logits("target_logits", target_logits, 1 if packed else 2)
            wide = wide or dtype is torch.float64
            if target_logits.requires_grad:
                self._refuse_grad("target_logits")
            if own != shape or target_logits.device != device:
                self._mismatch("target_logits", target_logits, shape, device, first)
        self.dtype = torch.float64 if wide else torch.float32
        self.slots = shape[-1]
        self.device = device
        # Spelt out: a loop over the tensors would take as long as the rest.
        self.concrete = (
            not self._compiling
            and _len_torch_dispatch_stack() == 0
            and not _is_tracing()
            and device.type != "meta"
            and (type(student_logits) in _PLAIN or _is_plain(student_logits))
            and (type(teacher_logits) in _PLAIN or _is_plain(teacher_logits))
            and (type(target_logits) in _PLAIN or _is_plain(target_logits))
            and (type(labels) in _PLAIN or _is_plain(labels))
            and (type(mask) in _PLAIN or _is_plain(mask))
            and (type(cu_seqlens) in _PLAIN or _is_plain(cu_seqlens))
            and (type(prior) in _PLAIN or _is_plain(prior))
            and (type(weights) in _PLAIN or _is_plain(weights))
            and (type(query_weights) in _PLAIN or _is_plain(query_weights))
        )
        if labels is not None:
            labels = self._check_labels(labels)
            if labels.shape != shape or labels.device != device:
                self._mismatch("labels", labels, shape, device, first)
        if cu_seqlens is not None:
            if mask is not None:
                raise ValueError("mask: only the padded layout takes a mask; with cu_seqlens leave it None")
            cu_seqlens = self._check_dense("cu_seqlens", cu_seqlens)
            if cu_seqlens.dtype not in _INDEX_DTYPES:
                self._wrong_type("cu_seqlens", cu_seqlens, "torch.int32 or torch.int64")
            if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
                raise ValueError(f"cu_seqlens: expected (Q + 1,), got {tuple(cu_seqlens.shape)}")
            if cu_seqlens.device != device:
                raise ValueError(f"cu_seqlens: expected device {device} like {first}, got {cu_seqlens.device}")
            self.num_queries = cu_seqlens.shape[0] - 1
        else:
            self.num_queries = shape[0]
            if mask is not None:
                mask = self._check_dense("mask", mask)
                if mask.dtype is not torch.bool:
                    self._wrong_type("mask", mask, "torch.bool")
                if mask.shape != shape or mask.device != device:
                    self._mismatch("mask", mask, shape, device, first)
        if prior is not None:
            prior = self._check_prior(prior, device, first)
        if weights is not None:
            weights = self._check_weights("weights", weights, shape, device, first, mask, cu_seqlens)
        if query_weights is not None:
            of_queries = torch.Size([self.num_queries])
            query_weights = self._check_weights("query_weights", query_weights, of_queries, device, first, None, None)
        self.student_logits = student_logits  # type: ignore[assignment]
        self.teacher_logits = teacher_logits  # type: ignore[assignment]
        self.target_logits = target_logits  # type: ignore[assignment]
        self.labels = labels  # type: ignore[assignment]
        self.mask = mask
        self.cu_seqlens = cu_seqlens
        self.prior = prior
        self.weights = weights
        self.query_weights = query_weights

    def with_prior(self, prior: Tensor) -> RankingBatch:
        """The same batch with other weights, which are not checked again."""
        other = copy.copy(self)
        other.prior = prior
        return other

    def with_student(self, student_logits: Tensor) -> RankingBatch:
        """The same batch with the student's logits in another dtype."""
        other = copy.copy(self)
        other.student_logits = student_logits
        return other

    def _check_dense(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor, with the sign that a lazy negation keeps beside its memory; kernels read memory alone."""
        if not isinstance(tensor, Tensor):
            self._wrong_type(name, tensor, "")
        if tensor.layout is not torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            raise TypeError(f"{name}: expected a dense tensor, got a {kind} one; pad it, or pack it and pass cu_seqlens")
        # While compiling there is no sign to ask for; the compiled op comes by here again with real tensors.
        return tensor.resolve_neg() if not self._compiling and tensor.is_neg() else tensor

    def _check_logits(self, name: str, tensor: Tensor, rank: int) -> tuple[Tensor, torch.Size, torch.dtype]:
        tensor = self._check_dense(name, tensor)
        shape, dtype = tensor.shape, tensor.dtype
        if dtype not in LOGIT_DTYPES:
            self._wrong_type(name, tensor, "a floating dtype (float32, float64, bfloat16, float16)")
        if len(shape) != rank:
            letters = ("Q, N" if not self.packed else "D") + (", M" if name == "teacher_logits" else "," * self.packed)
            layout = "packed: cu_seqlens is given" if self.packed else "padded; pass cu_seqlens for packed lists"
            raise ValueError(f"{name}: expected ({letters}) ({layout}), got {tuple(shape)}")
        return tensor, shape, dtype

    def _check_labels(self, labels: Tensor) -> Tensor:
        labels = self._check_dense("labels", labels)
        if labels.dtype in LABEL_DTYPES:
            if labels.requires_grad:
                self._refuse_grad("labels")
            return labels
        signed = _UNSIGNED_LABELS.get(labels.dtype)
        if signed is None:
            self._wrong_type("labels", labels, "a real dtype")
        if labels.dtype is torch.uint64 and self.concrete and labels.device.type == "cpu":
            wrapped = (labels.view(torch.int64) < 0).nonzero()
            if len(wrapped):
                raise label_error(integer=True, query=None if self.packed else int(wrapped[0, 0]))
        return labels.to(signed)

    @staticmethod
    def _wrong_type(name: str, tensor: object, wanted: str) -> NoReturn:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        raise TypeError(f"{name}: expected {wanted}, got {tensor.dtype}")

    @staticmethod
    def _refuse_tangents(**tensors: object) -> None:
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError(f"{name}: carries a forward-mode tangent, but pile_fast has reverse-mode gradients only")

    @staticmethod
    def _refuse_transform(student_logits: object, teacher_logits: object) -> NoReturn:
        name = "teacher_logits" if student_logits is None else "student_logits"
        raise RuntimeError(
            f"{name}: is inside a torch.func transform (vmap, grad, jvp, ...), whose stand-ins for tensors no kernel can read; "
            "call pile_fast on the whole batch, outside it"
        )

    @staticmethod
    def _refuse_grad(name: str) -> NoReturn:
        raise ValueError(f"{name}: requires grad, but only student_logits carries a gradient; pass {name}.detach()")

    @staticmethod
    def _mismatch(name: str, tensor: Tensor, shape: torch.Size, device: torch.device, first: str) -> NoReturn:
        if tensor.device != device:
            raise ValueError(f"{name}: expected device {device} like {first}, got {tensor.device}")
        letters, numbers = ("D", "Q, N")[len(shape) - 1], ", ".join(map(str, shape))
        tail = ", M" if name == "teacher_logits" else "," if len(shape) == 1 else ""
        raise ValueError(f"{name}: expected ({letters}{tail}) = ({numbers}{tail}) like {first}, got {tuple(tensor.shape)}")

    def _check_prior(self, prior: Tensor, device: torch.device, first: str) -> Tensor:
        prior = self._check_dense("prior", prior)
        if prior.dtype not in LOGIT_DTYPES:
            self._wrong_type("prior", prior, "a floating dtype")
        if prior.requires_grad:
            self._refuse_grad("prior")
        teachers, rank = self.num_teachers, prior.dim()
        # Number by number: a tracer with dynamic shapes cannot compare tuples of its symbols.
        if rank not in (1, 2) or prior.shape[-1] != teachers or (rank == 2 and prior.shape[0] != self.num_queries):
            raise ValueError(
                f"prior: expected (M,) = ({teachers},) or (Q, M) = ({self.num_queries}, {teachers}), got {tuple(prior.shape)}"
            )
        if prior.device != device:
            raise ValueError(f"prior: expected device {device} like {first}, got {prior.device}")
        # Reading values of a device tensor would stall the stream, so there a weight that is not a number >= 0 counts as 0.
        if device.type == "cpu" and self.concrete and prior.numel():
            # As numbers: for a few weights tensors' operations would take longer than the rest of a short call.
            for weights in [prior.tolist()] if rank == 1 else prior.tolist():
                if not all(0 <= weight < math.inf for weight in weights):
                    raise ValueError("prior: expected finite weights >= 0, got a negative, NaN or infinite entry")
                if not any(weights):
                    raise ValueError("prior: expected a weight > 0 for some teacher (of each query), got zeros alone")
        return prior

    def _check_weights(
        self, name: str, weights: Tensor, shape: torch.Size, device: torch.device, first: str, mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:  # fmt: skip
        weights = self._check_dense(name, weights)
        if weights.dtype not in LOGIT_DTYPES:
            self._wrong_type(name, weights, "a floating dtype")
        if weights.requires_grad:
            self._refuse_grad(name)
        if name == "query_weights" and weights.shape != shape:
            raise ValueError(f"{name}: expected (Q,) = ({self.num_queries},), got {tuple(weights.shape)}")
        if weights.shape != shape or weights.device != device:
            self._mismatch(name, weights, shape, device, first)
        # Reading values of a device tensor would stall the stream; there a wrong weight makes its query's loss NaN.
        if device.type == "cpu" and self.concrete:
            right = (weights >= 0) & (weights < math.inf)
            if not right.all():
                if mask is not None:
                    right |= ~mask
                if cu_seqlens is not None:
                    right[int(cu_seqlens[-1]) :] = True
                if not right.all():
                    value = weights[~right][0].item()
                    place = tuple((~right).nonzero()[0].tolist())
                    raise ValueError(f"{name}: expected finite weights >= 0, got {value} at {list(place)}")
        return weights


def _is_plain(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def label_error(*, integer: bool, query: int | None) -> ValueError:
    """What to raise for labels that cannot be told from others."""
    where = "" if query is None else f" in query {query}"
    if integer:
        return ValueError(f"labels: expected integers below 2^53, got a larger one{where}: labels are compared as float64")
    return ValueError(f"labels: expected finite numbers, or NaN for unlabelled, got ±inf{where}")


def check_cu_seqlens(cu_seqlens: Tensor, documents: int) -> None:
    """Raise ValueError unless `cu_seqlens` starts at 0, never decreases and ends at or before `documents`. Reads values."""
    starts = cu_seqlens.tolist()
    if starts[0] != 0:
        raise ValueError(f"cu_seqlens: expected the first entry to be 0, got {starts[0]}")
    for q, (a, b) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        if b < a:
            raise ValueError(f"cu_seqlens: expected non-decreasing entries, got {a} then {b} at query {q}")
    if starts[-1] > documents:
        raise ValueError(f"cu_seqlens: expected the last entry to be at most D = {documents}, got {starts[-1]}")


class PaddedView:
    """Packed tensors as padded ones and back; an identity for tensors that are padded already.

    For the code that is written once on (Q, N): the reference and the other ensembles. Packed input costs a copy and a
    read of `cu_seqlens`.
    """

    def __init__(self, batch: RankingBatch):
        self.packed = batch.packed
        some = next(t for t in (batch.student_logits, batch.teacher_logits, batch.target_logits) if t is not None)
        if batch.cu_seqlens is None:
            self.valid = (
                batch.mask if batch.mask is not None else torch.ones(some.shape[:2], dtype=torch.bool, device=some.device)
            )
            return
        self.documents = some.shape[0]
        check_cu_seqlens(batch.cu_seqlens, self.documents)
        starts = batch.cu_seqlens[:-1].long()
        lengths = batch.cu_seqlens[1:].long() - starts
        width = int(lengths.max()) if lengths.numel() else 0
        slots = torch.arange(width, device=some.device)
        self.valid = slots < lengths[:, None]
        self._index = torch.where(self.valid, starts[:, None] + slots, 0)

    @overload
    def pad(self, tensor: Tensor) -> Tensor: ...
    @overload
    def pad(self, tensor: None) -> None: ...
    def pad(self, tensor: Tensor | None) -> Tensor | None:
        """(D, ...) → (Q, N, ...); slots without a document hold an arbitrary document's values."""
        if tensor is None or not self.packed:
            return tensor
        if tensor.shape[0] == 0:
            return tensor.new_zeros((*self._index.shape, *tensor.shape[1:]))
        return tensor[self._index]

    def unpad(self, tensor: Tensor, fill: float) -> Tensor:
        """(Q, N, ...) → (D, ...); documents of no query get `fill`."""
        if not self.packed:
            return tensor
        out = tensor.new_full((self.documents, *tensor.shape[2:]), fill)
        out[self._index[self.valid]] = tensor[self.valid]
        return out

    def labels(self, batch: RankingBatch) -> Tensor | None:
        """(Q, N) labels, checked as far as their values can be read without waiting for a device.

        Raises:
            ValueError: a document's label is infinite, or an integer of 2^53 and more.
        """
        labels = self.pad(batch.labels)
        if labels is not None and batch.concrete and batch.device.type == "cpu":
            integer = not labels.is_floating_point()
            if not integer:
                wrong = labels.isinf()
            elif labels.dtype is torch.int64:
                wrong = (labels >= LABEL_LIMIT) | (labels <= -LABEL_LIMIT)
            else:
                return labels
            query = (wrong & self.valid).any(1).nonzero()
            if len(query):
                raise label_error(integer=integer, query=int(query[0]))
        return labels
