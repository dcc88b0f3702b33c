"""Lightning-IR's RankNet, and its SupervisedMarginMSE for distillation, on given scores. It has no ragged lists."""

import torch
from lightning_ir import CrossEncoderOutput, RankNet, SupervisedMarginMSE, TrainBatch

SCALES = dict.fromkeys(("pairwise_logistic", "pairwise_distillation"), "mean over all pairs of the batch")
RAGGED = False
PACKAGE = "lightning-ir"


def prepare(op, lists, variant):
    scores = torch.from_numpy(lists.scores).requires_grad_()
    targets = torch.from_numpy(lists.labels if op == "pairwise_logistic" else lists.targets)
    batch = TrainBatch(queries=[], docs=[], targets=targets)
    loss_fn = RankNet() if op == "pairwise_logistic" else SupervisedMarginMSE()

    def run():
        scores.grad = None
        loss = loss_fn.compute_loss(CrossEncoderOutput(scores=scores), batch)
        loss.backward()
        return loss.detach(), scores.grad

    return run
