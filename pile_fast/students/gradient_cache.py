"""Gradient caching (GradCache, Gao et al., RepL4NLP 2021): a listwise loss on more documents than fit in memory.

A loss over whole lists needs all logits before any gradient. So the encoder runs over the documents in passes of bounded
size without keeping activations; the loss and its gradient with respect to the logits are computed once; then, pass by
pass, the encoder runs again with activations and its backward follows. The two runs are PyTorch's activation checkpoint
of a pass, which restores the random state (so dropout is the same) and the autocast state. Loss and gradients are those
of the passes run at once; memory is that of one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pile_fast.extras import needs_extra

with needs_extra("train"):
    from accelerate.utils import extract_model_from_parallel


def forward_in_passes(model: nn.Module, inputs: dict[str, Tensor], size: int | None) -> Tensor:
    """Logits (D,) of a packed batch, the encoder seeing at most `size` texts at a time.

    Args:
        model: a student, possibly wrapped for data-parallel training.
        inputs: its inputs, a row per document (a `BiEncoder`'s "query_..." tokens: a row per query).
        size: texts per pass, >= 1; None = all of the batch in one.

    Raises:
        ValueError: the model gives something else than one logit per document.
    """
    module = extract_model_from_parallel(model)
    bi_encoder = "query_index" in inputs
    groups: Sequence[dict[str, Tensor]] = (inputs,)
    if bi_encoder:
        groups = module.split_tokens({name: tensor for name, tensor in inputs.items() if name != "query_index"})
    if size is None or all(_rows(group) <= size for group in groups):
        logits = logits_of(model(**inputs))
    elif bi_encoder:
        logits = module.compare(*_run(model, module, groups, size), inputs["query_index"])
    else:
        logits = logits_of(*_run(model, module, groups, size))
    if logits.shape != (_rows(groups[-1]),):
        raise ValueError(f"model: expected one logit per document, ({_rows(groups[-1])},), got {tuple(logits.shape)}")
    return logits


def logits_of(outputs: object) -> Tensor:
    """(D,) from what a ranker returns: a tensor (D,) or (D, 1), or an output with such `logits`."""
    logits = _tensor(outputs)
    return logits.squeeze(1) if logits.dim() == 2 and logits.shape[1] == 1 else logits


def _run(model: nn.Module, module: nn.Module, groups: Sequence[dict[str, Tensor]], size: int) -> list[Tensor]:
    """The model's outputs on each group of texts."""
    orders, passes = zip(*(_split(group, size) for group in groups), strict=True)
    last = passes[-1][-1]
    outputs = []
    for group in passes:
        chunks = []
        for tokens in group:
            if tokens is last:
                # The backward begins with the last pass, so its activations may stay. It is also the one that goes
                # through the wrapper: data-parallel training reduces the gradients once per forward of the wrapper.
                chunks.append(_tensor(model(**tokens)))
            else:
                chunks.append(_tensor(checkpoint(module, use_reentrant=False, **tokens)))
            # Else the passes would share the half-precision copies of the weights, and sum their gradients in them.
            torch.clear_autocast_cache()
        outputs.append(torch.cat(chunks))
    return [output[order.argsort()] for output, order in zip(outputs, orders, strict=True)]


def _split(tokens: dict[str, Tensor], size: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """(order of the texts, passes in that order): texts of like length together, without the padding all share."""
    mask = tokens.get("attention_mask")
    if mask is None:
        order = torch.arange(_rows(tokens), device=next(iter(tokens.values())).device)
    else:
        order = mask.sum(1).argsort(descending=True, stable=True)  # the longest first: too long for the memory shows at once
    passes = []
    for rows in order.split(size):
        chunk = {name: tensor[rows] for name, tensor in tokens.items()}
        if mask is not None:
            used = chunk["attention_mask"].any(0)
            chunk = {name: tensor[:, used] if tensor.shape[1:] == mask.shape[1:] else tensor for name, tensor in chunk.items()}
        passes.append(chunk)
    return order, passes


def _rows(tokens: dict[str, Tensor]) -> int:
    return len(next(iter(tokens.values())))


def _tensor(outputs: Any) -> Tensor:
    return getattr(outputs, "logits", outputs)
