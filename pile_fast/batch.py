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

import torch
from torch import Tensor

LOGIT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGER_LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
LABEL_DTYPES = LOGIT_DTYPES + _INTEGER_LABELS
_INDEX_DTYPES = (torch.int32, torch.int64)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype the arithmetic runs in: float64 if any logit tensor is float64, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32


class RankingBatch:
    """Checked tensors of one call.

    Build it, then read the tensors, `packed`, `num_queries`, `num_teachers`, `slots` (N or D), `device` and `dtype` (of the
    arithmetic: float64 if any logits are, else float32).

    Args:
        student_logits: (Q, N) or (D,), float; the only tensor that may carry a gradient.
        teacher_logits: (Q, N, M) or (D, M), float; NaN = this teacher did not score this document.
        target_logits: (Q, N) or (D,), float; NaN = no target for this document.
        labels: (Q, N) or (D,), float or integer; larger is better, NaN = unlabelled.
        mask: (Q, N) bool, True = the slot holds a document. Padded layout only.
        cu_seqlens: (Q + 1,) int32 or int64, starts of the queries. Its presence selects the packed layout.
        prior: (M,) or (Q, M), float >= 0, the teachers' weights to start from.

    Raises:
        TypeError: an argument is not a tensor, or has the wrong dtype.
        ValueError: a shape, device or value does not fit; the message names the argument, what is wanted and what was given.
    """

    __slots__ = (
        "student_logits", "teacher_logits", "target_logits", "labels", "mask", "cu_seqlens", "prior",
        "packed", "num_queries", "num_teachers", "slots", "device", "dtype",
    )  # fmt: skip

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
    ):
        self.student_logits = student_logits
        self.teacher_logits = teacher_logits
        self.target_logits = target_logits
        self.labels = labels
        self.mask = mask
        self.cu_seqlens = cu_seqlens
        self.prior = prior
        self.packed = packed = cu_seqlens is not None

        # The student, else the teachers, fix shape and device; the others are held against them.
        shape = device = first = dtype = None
        wide = False
        self.num_teachers = 0
        if student_logits is not None:
            shape, dtype = self._check_logits("student_logits", student_logits, 1 if packed else 2)
            device, first, wide = student_logits.device, "student_logits", dtype is torch.float64
        if teacher_logits is not None:
            own, dtype = self._check_logits("teacher_logits", teacher_logits, 2 if packed else 3)
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
        if target_logits is not None:
            own, dtype = self._check_logits("target_logits", target_logits, 1 if packed else 2)
            wide = wide or dtype is torch.float64
            if target_logits.requires_grad:
                self._refuse_grad("target_logits")
            if own != shape or target_logits.device != device:
                self._mismatch("target_logits", target_logits, shape, device, first)
        self.dtype = torch.float64 if wide else torch.float32
        if shape is None:
            raise TypeError("student_logits: expected a torch.Tensor, got None")
        self.slots = shape[-1]
        self.device = device
        if labels is not None:
            if not isinstance(labels, Tensor) or labels.dtype not in LABEL_DTYPES:
                self._wrong_type("labels", labels, "a real dtype")
            if labels.requires_grad:
                self._refuse_grad("labels")
            if labels.shape != shape or labels.device != device:
                self._mismatch("labels", labels, shape, device, first)
        if packed:
            if mask is not None:
                raise ValueError("mask: only the padded layout takes a mask; with cu_seqlens leave it None")
            if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in _INDEX_DTYPES:
                self._wrong_type("cu_seqlens", cu_seqlens, "torch.int32 or torch.int64")
            if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
                raise ValueError(f"cu_seqlens: expected (Q + 1,), got {tuple(cu_seqlens.shape)}")
            if cu_seqlens.device != device:
                raise ValueError(f"cu_seqlens: expected device {device} like {first}, got {cu_seqlens.device}")
            self.num_queries = cu_seqlens.shape[0] - 1
        else:
            self.num_queries = shape[0]
            if mask is not None:
                if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
                    self._wrong_type("mask", mask, "torch.bool")
                if mask.shape != shape or mask.device != device:
                    self._mismatch("mask", mask, shape, device, first)
        if prior is not None:
            self._check_prior(prior, device, first)

    def _check_logits(self, name: str, tensor, rank: int) -> tuple[torch.Size, torch.dtype]:
        if not isinstance(tensor, Tensor):
            self._wrong_type(name, tensor, "")
        shape, dtype = tensor.shape, tensor.dtype
        if dtype not in LOGIT_DTYPES:
            self._wrong_type(name, tensor, "a floating dtype (float32, float64, bfloat16, float16)")
        if len(shape) != rank:
            letters = ("Q, N" if not self.packed else "D") + (", M" if name == "teacher_logits" else "," * self.packed)
            layout = "packed: cu_seqlens is given" if self.packed else "padded; pass cu_seqlens for packed lists"
            raise ValueError(f"{name}: expected ({letters}) ({layout}), got {tuple(shape)}")
        return shape, dtype

    @staticmethod
    def _wrong_type(name: str, tensor, wanted: str) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        raise TypeError(f"{name}: expected {wanted}, got {tensor.dtype}")

    @staticmethod
    def _refuse_grad(name: str) -> None:
        raise ValueError(f"{name}: requires grad, but only student_logits carries a gradient; pass {name}.detach()")

    @staticmethod
    def _mismatch(name: str, tensor: Tensor, shape: torch.Size, device: torch.device, first: str) -> None:
        if tensor.device != device:
            raise ValueError(f"{name}: expected device {device} like {first}, got {tensor.device}")
        letters, numbers = ("D", "Q, N")[len(shape) - 1], ", ".join(map(str, shape))
        tail = ", M" if name == "teacher_logits" else "," if len(shape) == 1 else ""
        raise ValueError(f"{name}: expected ({letters}{tail}) = ({numbers}{tail}) like {first}, got {tuple(tensor.shape)}")

    def _check_prior(self, prior: Tensor, device: torch.device, first: str) -> None:
        if not isinstance(prior, Tensor) or prior.dtype not in LOGIT_DTYPES:
            self._wrong_type("prior", prior, "a floating dtype")
        if prior.requires_grad:
            self._refuse_grad("prior")
        teachers = self.teacher_logits.shape[-1]
        if tuple(prior.shape) not in ((teachers,), (self.num_queries, teachers)):
            raise ValueError(
                f"prior: expected (M,) = ({teachers},) or (Q, M) = ({self.num_queries}, {teachers}), got {tuple(prior.shape)}"
            )
        if prior.device != device:
            raise ValueError(f"prior: expected device {device} like {first}, got {prior.device}")
        # Reading values of a device tensor would stall the stream, so there a negative prior counts as 0.
        if device.type == "cpu" and not torch.compiler.is_compiling() and not bool((prior >= 0).all()):
            raise ValueError("prior: expected weights >= 0, got a negative or NaN entry")


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
        if not self.packed:
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
