"""`StepCheck`: stops training before the first optimiser step whose losses or gradients are not finite.

It costs one reading of the device per optimiser step, three numbers; the gradients' norm, as clipping does; and over several
processes one reduction of the three. The `Trainer`'s own filter, which reads the device after every batch only to leave NaN
out of its log, is not needed beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pile_fast.extras import needs_extra

with needs_extra("train"):
    from accelerate import Accelerator
    from accelerate.utils import gather_object

# A step that overflows in float16 is skipped, and the loss's scale halved. From here on it is no overflow; fairseq's limit.
_SMALLEST_LOSS_SCALE = 1e-4
_SHOWN = 5
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class StepCheck:
    """What one optimiser step computed: its queries' losses, and whether they and the gradients are finite.

    Attributes:
        queries: the names of the last checked step's queries on this process.
        idle: whether all losses of all steps so far were 0, which is what a query without a pair gives; on every process.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._batches: list[tuple[Tensor, Tensor, Tensor, Sequence[str]]] = []
        self.queries: list[str] = []
        self.idle = True

    def add(self, losses: Tensor, logits: Tensor, cu_seqlens: Tensor, queries: Sequence[str]) -> None:
        """A batch's losses (Q,), student logits (D,) and names of queries."""
        self._batches.append((losses.detach(), logits.detach(), cu_seqlens, queries))

    def finish(self, model: nn.Module, step: int) -> None:
        """Look at the batches added since the last call and at the gradients that they left in the model.

        Raises:
            FloatingPointError: on every process at once; names the step, and the queries or the parameter.
        """
        batches, self._batches = self._batches, []
        self.queries = [name for *_, queries in batches for name in queries]
        if not batches:  # someone computes the loss in another way
            return
        losses = torch.cat([losses for losses, *_ in batches]).float()
        scaler = getattr(self._accelerator, "scaler", None)
        if scaler is not None and not scaler.is_enabled():
            scaler = None
        # With a scaler, a gradient that overflows is no error: it skips the step and tries a smaller scale.
        gradients = [] if scaler is not None else [p.grad for p in model.parameters() if p.grad is not None and p.grad.numel()]
        found = torch.stack([~losses.isfinite().all(), _no_norm(gradients, losses.device), losses.ne(0).any()]).float()
        if self._accelerator.num_processes > 1:
            found = self._accelerator.reduce(found, "sum")
        bad_losses, bad_gradients, learns = found.tolist()
        self.idle = self.idle and not learns
        if bad_losses:
            raise FloatingPointError(f"step {step}: {self._about_losses(batches)}")
        if bad_gradients:
            bad = list(dict.fromkeys(self._gather(_bad_gradients(model))))
            what = _not_finite("the gradient", bad) if bad else "the gradient is so large that its norm is not finite"
            raise FloatingPointError(f"step {step}: {what}; {self._about_queries()}")
        if scaler is not None and scaler.get_scale() < _SMALLEST_LOSS_SCALE:
            raise FloatingPointError(
                f"step {step}: the gradients are not finite in float16, however the loss is scaled; {self._about_queries()}"
            )

    def _about_queries(self) -> str:
        return f"the step's queries: {shown(self._gather(self.queries))}"

    def _about_losses(self, batches: Iterable[tuple[Tensor, Tensor, Tensor, Sequence[str]]]) -> str:
        names, logits_too = [], []
        for losses, logits, cu_seqlens, queries in batches:
            bounds = cu_seqlens.tolist()
            for q in (~losses.isfinite()).nonzero().flatten().tolist():
                names.append(queries[q])
                if not logits[bounds[q] : bounds[q + 1]].isfinite().all():
                    logits_too.append(queries[q])
        names, logits_too = self._gather(names), self._gather(logits_too)
        text = f"the loss is not finite for {'query' if len(names) == 1 else 'queries'} {shown(names)}"
        return f"{text}; the student's logits are not finite there" if logits_too else text

    def _gather(self, names: list[str]) -> list[str]:
        return gather_object(names) if self._accelerator.num_processes > 1 else names


def check_weights(model: nn.Module, step: int, queries: Sequence[str]) -> None:
    """Refuse to evaluate or save a model whose weights the last step, on `queries`, has spoilt.

    Raises:
        FloatingPointError: a trained weight is not finite or a buffer is NaN (masks may well be infinite); names the step, its
            queries and the weight.
    """
    broken = {name: ~_local(p).isfinite().all() for name, p in model.named_parameters() if p.requires_grad and _counts(p)}
    broken |= {name: _local(buffer).isnan().any() for name, buffer in model.named_buffers() if _counts(buffer)}
    if not broken:
        return
    device = next(iter(broken.values())).device
    flags = torch.stack([flag.to(device) for flag in broken.values()]).tolist()
    if any(flags):
        bad = [name for name, flag in zip(broken, flags, strict=True) if flag]
        raise FloatingPointError(f"step {step}: {_not_finite('the weight', bad)} after it; its queries: {shown(queries)}")


def shown(names: Sequence[str]) -> str:
    """The first of the names, and how many there are."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest:,} more" if rest > 0 else "")


def _not_finite(what: str, names: Sequence[str]) -> str:
    return f"{what} of {names[0]}{f' and {len(names) - 1:,} more' if len(names) > 1 else ''} is not finite"


def _bad_gradients(model: nn.Module) -> list[str]:
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not _local(p.grad).isfinite().all()]
    return [name.removeprefix("module.").removeprefix("_orig_mod.") for name in bad]


def _no_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """() bool on the device: their norm is not finite, because one of them is not, or their squares overflow.

    The Trainer divides by this norm: the gradients would become 0 or NaN.
    """
    if not gradients:
        return torch.zeros((), dtype=torch.bool, device=device)
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return ~norm.isfinite().to(device)


def _counts(tensor: Tensor) -> bool:
    return tensor.dtype in _FLOATS and not tensor.is_meta


def _local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
