"""What a call costs where there is almost nothing to compute: one query, 8 documents, 2 teachers, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from _cases import ENSEMBLE, ITERATIONS, LOSS, Data

import pile_fast
from pile_fast import autograd

EMPTY = "empty autograd.Function"


class _Empty(torch.autograd.Function):
    """The floor: takes the same tensors, computes nothing."""

    @staticmethod
    def forward(ctx, student, teachers, labels):
        ctx.shape = student.shape
        return student.new_empty(())

    @staticmethod
    def backward(ctx, upstream):
        return upstream.expand(ctx.shape), None, None


OPTIONS = {"iterations": ITERATIONS, "granularity": "document"}
# mask, cu_seqlens, prior, weights, query_weights, options, gradient, pulls, backend
_FLAT = (None, None, None, None, None, *autograd.flat(ENSEMBLE["document"]), *autograd.flat(LOSS), True, False, "cpp")


class _ThroughDispatcher(torch.autograd.Function):
    """The least that a registered op (define + impl) costs: no checks or defaults of `pile_fast.functional` before it."""

    @staticmethod
    def forward(ctx, student, teachers, labels):
        loss, gradient, _ = torch.ops.pile_fast.pile_loss(student, teachers, labels, *_FLAT)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0] * upstream, None, None


def _custom_op() -> Callable:
    """The same implementation under torch.library.custom_op, its autograd registered with the op."""
    schema = str(torch.ops.pile_fast.pile_loss.default._schema)
    op = torch.library.custom_op(
        "pile_fast_benchmark::pile_loss", autograd._pile_loss._compute, mutates_args=(), schema=schema[schema.index("(") :]
    )

    def keep(ctx, inputs, output):
        ctx.save_for_backward(output[1])
        ctx.inputs = len(inputs)

    def backward(ctx, upstream, *_):
        return ctx.saved_tensors[0] * upstream, *[None] * (ctx.inputs - 1)

    op.register_autograd(backward, setup_context=keep)
    return lambda student, teachers, labels: op(student, teachers, labels, *_FLAT)[0]


def _ranknet(student, teachers, labels):
    """Plain eager RankNet on the labels, in broadcast form. Reads no teachers."""
    difference = student.unsqueeze(2) - student.unsqueeze(1)
    above = labels.unsqueeze(2) > labels.unsqueeze(1)
    return (F.softplus(-difference) * above).sum() / above.sum().clamp(min=1)


def calls(data: Data) -> tuple[dict[str, Callable], set[str]]:
    """What to time, and the names of those that compute the loss and so can be checked."""
    module = pile_fast.PILELoss(**OPTIONS)

    def training(function):
        def step():
            data.student.grad = None
            loss = function(data.student, data.teachers, data.labels)
            loss.backward()
            return loss

        return step

    def no_grad():
        with torch.no_grad():
            return pile_fast.pile_loss(data.student, data.teachers, data.labels, **OPTIONS)

    computing = {
        "pile_loss": training(lambda *tensors: pile_fast.pile_loss(*tensors, **OPTIONS)),
        "PILELoss": training(module),
        "op by define + impl, in an autograd.Function": training(_ThroughDispatcher.apply),
        "op by custom_op with register_autograd": training(_custom_op()),
    }
    others = {
        EMPTY: training(_Empty.apply),
        "pile_loss under no_grad, forward only": no_grad,
        "plain RankNet, eager": training(_ranknet),
    }
    return others | computing, set(computing)
