"""This package by each of its ways to sum over pairs, its reference as it is and under torch.compile, and `pile_loss`."""

import torch

import pile_fast
from pile_fast import reference
from pile_fast.options import loss_options

SCALES = dict.fromkeys(("pairwise_logistic", "pairwise_distillation"), "mean over queries of the mean over pairs")
SCALES["pile_loss"] = None
RAGGED = True
PACKAGE = "pile_fast"
OPTIONS = {
    "pairwise_logistic": loss_options(alpha=0.0),
    "pairwise_distillation": loss_options(distillation="mse"),
}


def prepare(op, lists, variant):
    """A variant may end in a dtype of the logits: "auto/bfloat16"."""
    variant, _, dtype = variant.partition("/")
    dtype = getattr(torch, dtype or "float32")
    if variant in ("eager", "torch.compile"):
        return plain(op, lists, variant, dtype)
    if op == "pile_loss":
        return distil(lists)
    valid = lists.valid if lists.ragged else ...
    shape = (-1,) if lists.ragged else lists.scores.shape  # ragged lists are packed, not padded
    against = lists.labels if op == "pairwise_logistic" else lists.targets
    scores, against = (torch.from_numpy(x[valid].reshape(shape)) for x in (lists.scores, against))
    scores = scores.to(dtype).requires_grad_()
    if op == "pairwise_distillation":
        against = against.to(dtype)
    options = {"backend": "cpp"}
    if lists.ragged:
        options["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), torch.from_numpy(lists.lengths).cumsum(0)])
    if op == "pairwise_logistic":
        function, options["pairwise"] = pile_fast.ranking_loss, variant
    else:
        function, options["kind"] = pile_fast.distillation_loss, "mse"

    def run():
        scores.grad = None
        loss = function(scores, against, **options)
        loss.backward()
        return loss.detach(), scores.grad

    return run


def distil(lists):
    """`pile_loss` with four teachers, on lists of one length."""
    scores, labels, targets = (torch.from_numpy(x) for x in lists[:3])
    scores.requires_grad_()
    teachers = targets.unsqueeze(-1) + torch.randn(*targets.shape, 4)

    def run():
        scores.grad = None
        loss = pile_fast.pile_loss(scores, teachers, labels, alpha=0.7, granularity="document")
        loss.backward()
        return loss.detach(), scores.grad

    return run


def plain(op, lists, variant, dtype):
    """Plain autograd over the reference: what one would write in PyTorch, masks and all."""
    scores, labels, targets = (torch.from_numpy(x) for x in lists[:3])
    scores, targets = scores.to(dtype).requires_grad_(), targets.to(dtype)
    valid = torch.from_numpy(lists.valid)

    def function(scores):
        pairs = reference.pair_loss(scores, targets, labels, valid, OPTIONS[op])
        return reference.reduce(pairs, "mean")

    if variant == "torch.compile":
        function = torch.compile(function, fullgraph=True, dynamic=False)

    def run():
        scores.grad = None
        loss = function(scores)
        loss.backward()
        return loss.detach(), scores.grad

    if variant == "torch.compile":
        run()  # compilation is not counted
    return run
