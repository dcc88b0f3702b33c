"""allRank's rankNet. Its package imports torchvision and gcsfs, for reading data sets; empty modules stand in for them."""

import sys
from unittest.mock import MagicMock

import torch

for absent in ("torchvision", "torchvision.transforms", "gcsfs"):
    sys.modules.setdefault(absent, MagicMock())

from allrank.models.losses.rankNet import rankNet  # noqa: E402

SCALES = {"pairwise_logistic": "mean over all pairs of the batch"}
RAGGED = True
PACKAGE = "allrank"


def prepare(op, lists, variant):
    scores = torch.from_numpy(lists.scores).requires_grad_()
    labels = torch.from_numpy(lists.labels).masked_fill(~torch.from_numpy(lists.valid), -1)  # its sign for an empty slot

    def run():
        scores.grad = None
        loss = rankNet(scores, labels)
        loss.backward()
        return loss.detach(), scores.grad

    return run
