"""pytorchltr's PairwiseLogisticLoss; it returns a loss per query, of which its documentation takes the mean."""

import torch
from pytorchltr.loss import PairwiseLogisticLoss

SCALES = {"pairwise_logistic": "mean over queries of the sum over pairs, in bits"}
RAGGED = True
PACKAGE = "pytorchltr"


def prepare(op, lists, variant):
    scores = torch.from_numpy(lists.scores).requires_grad_()
    labels, lengths = torch.from_numpy(lists.labels).long(), torch.from_numpy(lists.lengths)
    loss_fn = PairwiseLogisticLoss()

    def run():
        scores.grad = None
        loss = loss_fn(scores, labels, lengths).mean()
        loss.backward()
        return loss.detach(), scores.grad

    return run
