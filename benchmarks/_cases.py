"""The inputs, what is timed on them, and the check a provider must pass before it gets a figure."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import pile_fast
from pile_fast import reference
from pile_fast.options import ensemble_options, loss_options

ITERATIONS = 10
GRANULARITIES = ("document", "query")
ENSEMBLE = {g: ensemble_options(iterations=ITERATIONS, granularity=g) for g in GRANULARITIES}
LOSS = loss_options()

# The numerics contract of docs/algorithm.md, float32: of the largest calibrated logit, of the largest gradient entry.
ENSEMBLE_TOLERANCE, LOSS_TOLERANCE = 2e-6, 1e-5


class Op(NamedTuple):
    """What is timed: an ensemble, or a loss with its gradient."""

    name: str
    granularity: str

    @property
    def mode(self) -> str:
        return "forward" if self.name == "pile_ensemble" else "forward+backward"

    def __str__(self) -> str:
        return f"{self.name} {self.granularity}, {self.mode}"


OPS = (Op("pile_ensemble", "document"), Op("pile_ensemble", "query"), Op("pile_loss", "document"))


class Data(NamedTuple):
    student: Tensor  # (Q, N), requires grad
    teachers: Tensor  # (Q, N, M)
    labels: Tensor  # (Q, N), float32 grades 0 to 4: two fifths of all pairs differ
    valid: Tensor  # (Q, N), all true

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.teachers.shape)

    def label_pairs(self) -> int:
        """Pairs of one query's documents with different labels, over all queries."""
        counts = torch.stack([(self.labels == grade).sum(1) for grade in self.labels.unique()], 1)
        return int((self.labels.shape[1] ** 2 - counts.square().sum(1)).sum()) // 2


def make_data(queries: int, documents: int, teachers: int) -> Data:
    """Graded labels, teachers that know them the better the later they come, and an undertrained student."""
    seeded = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (queries, documents), generator=seeded).float()
    logits = torch.randn(queries, documents, teachers, generator=seeded)
    logits.addcmul_(labels.unsqueeze(-1), torch.linspace(0.2, 1.0, teachers))
    student = torch.randn(queries, documents, generator=seeded).add_(labels, alpha=0.3).requires_grad_()
    return Data(student, logits, labels, torch.ones(queries, documents, dtype=torch.bool))


def call(op: Op, data: Data, **options):
    """A call of the package as a function without arguments; a loss leaves its gradient in `data.student.grad`."""
    options = dict(options, iterations=ITERATIONS, granularity=op.granularity)
    if op.name == "pile_ensemble":
        return lambda: pile_fast.pile_ensemble(data.teachers, data.labels, **options).logits

    def loss():
        data.student.grad = None
        value = pile_fast.pile_loss(data.student, data.teachers, data.labels, **options)
        value.backward()
        return value

    return loss


def plain_torch(op: Op, data: Data, compiled: bool = False):
    """What a user would write with the reference: plain autograd, no gradient of our own. Optionally torch.compile of it."""

    def ensemble(teachers, labels, valid):
        return reference.ensemble(teachers, labels, valid, ENSEMBLE[op.granularity]).logits

    def loss(student, teachers, labels, valid):
        with torch.no_grad():
            target = ensemble(teachers, labels, valid)
        return reference.reduce(reference.pair_loss(student, target, labels, valid, LOSS), "mean")

    function = ensemble if op.name == "pile_ensemble" else loss
    if compiled:
        function = torch.compile(function, fullgraph=True, dynamic=False)
    if op.name == "pile_ensemble":
        return lambda: function(*data[1:])

    def step():
        data.student.grad = None
        value = function(*data)
        value.backward()
        return value

    return step


class Check:
    """Holds providers against float64: the reference, on as many of the queries as have 2^24 pairs between them.

    The reference needs n² memory. A list of more than 2,048 documents is held against this package in float64 instead, by
    direct sums up to 32,768 documents and by the degree 16 tables above; tests/ holds those against the reference.
    """

    def __init__(self, op: Op, data: Data):
        self.op, self.data = op, data
        num_queries, documents, _ = data.shape
        checked = min(num_queries, max(1, 2**24 // documents**2))
        values, gradients = [], []
        self.largest = 0.0
        if documents <= 2048:
            self.against, chunk = "reference", max(1, 2**22 // documents**2)
        else:
            self.against, chunk = f"cpp {'direct' if documents <= 2**15 else 'chebyshev'}", 1
        for begin in range(0, checked, chunk):
            part = Data(*(tensor.detach()[begin : min(begin + chunk, checked)] for tensor in data))
            part = Data(part.student.double().requires_grad_(), part.teachers.double(), *part[2:])
            if self.against == "reference":
                run = plain_torch(op, part)
            else:
                run = call(op, part, backend="cpp", pairwise=self.against.split()[1])
            share = len(part.labels) / num_queries if op.name == "pile_loss" else 1.0  # of the mean over all queries
            values.append(run().detach() * share)
            if op.name == "pile_loss":
                gradients.append(part.student.grad * share)
            present = reference.present_teachers(part.teachers, part.valid)
            self.largest = max(self.largest, reference.calibrate(part.teachers, present, "zscore").abs().max().item())
        self.whole = checked == num_queries
        self.values = torch.cat(values) if op.name == "pile_ensemble" else sum(values)
        self.gradient = torch.cat(gradients) if gradients else None

    def failure(self, output: Tensor) -> str:
        """What is wrong with a provider's output (for a loss also with the gradient it left behind); "" if nothing is."""
        if self.op.name == "pile_ensemble":
            return self._differs("logits", output[: len(self.values)], self.values, ENSEMBLE_TOLERANCE * self.largest)
        gradient = self.data.student.grad[: len(self.gradient)]
        failure = self._differs("gradient", gradient, self.gradient, LOSS_TOLERANCE * self.gradient.abs().max().item())
        if self.whole:  # a mean cannot be compared with that of some of the queries
            failure = failure or self._differs("loss", output.detach(), self.values, LOSS_TOLERANCE * self.values.abs().item())
        return failure

    def _differs(self, what: str, actual: Tensor, expected: Tensor, tolerance: float) -> str:
        error = (actual.double() - expected).abs().max().item()
        if error <= tolerance:  # false for NaN
            return ""
        return f"wrong: {what} off by {error:.1e} from {self.against} in float64, allowed {tolerance:.1e}"
