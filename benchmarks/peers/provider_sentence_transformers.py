"""sentence-transformers' RankNetLoss (its LambdaLoss without weights) on given logits.

The loss calls the model itself, on (query, document) pairs; here a model that does nothing but return the logits, once for the
whole batch. What remains of its forward is the loss, and the list of pairs that it makes in Python.
"""

import torch
from sentence_transformers.cross_encoder.losses import RankNetLoss

SCALES = {"pairwise_logistic": "mean over all pairs of the batch"}
RAGGED = True
PACKAGE = "sentence-transformers"


class Logits:
    num_labels, device = 1, torch.device("cpu")

    def __init__(self, logits):
        self.logits = logits

    def preprocess(self, pairs, prompt=None, task=None):
        return {}

    def __call__(self, features):
        return {"scores": self.logits}


def prepare(op, lists, variant):
    logits = torch.from_numpy(lists.scores[lists.valid]).requires_grad_()
    labels = [torch.from_numpy(row[:n].copy()) for row, n in zip(lists.labels, lists.lengths, strict=True)]
    inputs = [["query"] * len(labels), [["document"] * n for n in lists.lengths]]
    loss_fn = RankNetLoss(Logits(logits), reduction_log="natural", mini_batch_size=-1)

    def run():
        logits.grad = None
        loss = loss_fn(inputs, labels)
        loss.backward()
        return loss.detach(), logits.grad

    return run
