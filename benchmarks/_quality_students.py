"""Many `FeatureRanker`s trained at once: one stack of networks, batched matrix products, one loss call for all of them.

K students × S seeds. Within a seed everything random is the same for all K students (initial weights, order of the queries,
dropout), so that chance blurs their differences less. Targets are computed once, outside, because they do not depend on the
student; those that do (AE-KD, GOVERN) are computed again at the start of some epochs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pile_fast import distillation_loss, ranking_loss
from pile_fast.data import RankedLists
from pile_fast.evaluation.metrics import ndcg
from pile_fast.students import FeatureRanker, FeatureRankerConfig

QUERIES_PER_STEP = 32
BETAS, EPSILON = (0.9, 0.999), 1e-8


class MovingTarget(NamedTuple):
    """Targets (D,) from the student's logits (D,) on the training documents, at the start of the epochs `when`."""

    compute: Callable[[Tensor], Tensor]
    when: Collection[int]


class Student(NamedTuple):
    """How one student is trained: alpha · distillation + (1 − alpha) · labels, as in `pile_fast.pile_loss`.

    Attributes:
        target: (D,) logits to distil (NaN = none); None = labels alone.
        labels: (D,) the labels of the label loss.
        alpha: weight of the distillation.
        temperature: τ of the distillation.
        pair_weight: ω of the label loss.
        learning_rate: of Adam, falling linearly to 0.
    """

    target: Tensor | MovingTarget | None
    labels: Tensor
    alpha: float = 1.0
    temperature: float = 1.0
    pair_weight: str | None = None
    learning_rate: float = 1e-3


class Stack:
    """Trained students as K × S networks; `scores` gives their logits, `model` one of them as a `FeatureRanker`."""

    def __init__(self, config: FeatureRankerConfig, models: Sequence[FeatureRanker], students: int):
        self.config = config
        self.mean, self.scale = models[0].mean, models[0].scale
        linears = [[m for m in model.layers if isinstance(m, torch.nn.Linear)] for model in models]
        self.parameters: list[Tensor] = []
        for layer in zip(*linears, strict=True):
            for tensors in ([m.weight.detach().T for m in layer], [m.bias.detach()[None] for m in layer]):
                self.parameters.append(torch.stack(tensors).expand(students, *([-1] * 3)).clone().requires_grad_())

    def logits(self, x: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        """(K, S, D) from standardised features (S, D, F) or (D, F); `masks`, one per hidden layer, (S, D, H), are dropout's."""
        students, seeds = self.parameters[0].shape[:2]
        x = x.expand(students, seeds, *x.shape[-2:]).flatten(0, 1)
        layers = len(self.parameters) // 2
        for i in range(layers):
            x = torch.baddbmm(self.parameters[2 * i + 1].flatten(0, 1), x, self.parameters[2 * i].flatten(0, 1))
            if i + 1 < layers:
                x = torch.relu(x)
                x = x * masks[i].repeat(students, 1, 1) if masks else x
        return x.view(students, seeds, -1)

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """(K, S, D) logits of documents' features (D, F)."""
        return self.logits((features - self.mean) * self.scale)

    def model(self, student: int, seed: int) -> FeatureRanker:
        model = FeatureRanker(self.config)
        model.mean.copy_(self.mean)
        model.scale.copy_(self.scale)
        linears = [m for m in model.layers if isinstance(m, torch.nn.Linear)]
        with torch.no_grad():
            for i, linear in enumerate(linears):
                linear.weight.copy_(self.parameters[2 * i][student, seed].T)
                linear.bias.copy_(self.parameters[2 * i + 1][student, seed, 0])
        return model.eval()


class _Batch(NamedTuple):
    documents: Tensor  # (S, D') of the training set; the padding repeats document 0
    filled: Tensor  # (S, D') bool
    lengths: Tensor  # (S, B + 1), the last is the padding as a query of its own, which has no targets and no labels


def _batches(lists: RankedLists, generators: Sequence[torch.Generator]) -> list[_Batch]:
    """One epoch: each seed goes through the queries in an order of its own."""
    starts, lengths = lists.cu_seqlens[:-1], lists.cu_seqlens.diff()
    orders = torch.stack([torch.randperm(len(lists), generator=g) for g in generators])
    batches = []
    for queries in orders.split(QUERIES_PER_STEP, 1):
        sizes = lengths[queries]
        most = int(sizes.sum(1).max())
        documents = torch.zeros(len(generators), most, dtype=torch.long)
        filled = torch.arange(most) < sizes.sum(1, keepdim=True)
        first = sizes.cumsum(1) - sizes
        offset = (starts[queries] - first).flatten().repeat_interleave(sizes.flatten())
        documents[filled] = filled.nonzero()[:, 1] + offset
        batches.append(_Batch(documents, filled, torch.cat([sizes, most - sizes.sum(1, keepdim=True)], 1)))
    return batches


def train(
    students: Sequence[Student],
    seeds: Sequence[int],
    lists: RankedLists,
    validation: RankedLists,
    *,
    epochs: int = 15,
    hidden_sizes: Sequence[int] = (64, 64),
    dropout: float = 0.1,
) -> tuple[Stack, Tensor]:
    """Train every student with every seed; each is kept as it was after its best epoch on the validation queries.

    Returns:
        The stack, and the NDCG@10 (K, S) on the validation queries.
    """
    config = FeatureRankerConfig(num_features=lists.features.shape[1], hidden_sizes=hidden_sizes, dropout=dropout)
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(FeatureRanker(config).fit_standardization(lists.features))
    stack = Stack(config, models, len(students))
    loss = _Loss(students, len(seeds), lists.labels.shape[0])
    adam = _Adam(stack.parameters, torch.tensor([s.learning_rate for s in students]))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    features = (lists.features - stack.mean) * stack.scale

    best = torch.full((len(students), len(seeds)), -math.inf, dtype=torch.float64)
    kept = [p.detach().clone() for p in stack.parameters]
    steps = epochs * math.ceil(len(lists) / QUERIES_PER_STEP)
    for epoch in range(epochs):
        loss.move_targets(epoch, lambda: stack.scores(lists.features))
        for batch in _batches(lists, generators):
            masks = _dropout(batch.documents.shape[1], hidden_sizes, dropout, generators)
            loss(stack.logits(features[batch.documents], masks), batch).backward()
            adam.step(1 - adam.steps / steps)
        quality = quality_on(validation, stack.scores(validation.features))
        better = quality > best
        best = torch.where(better, quality, best)
        for held, parameter in zip(kept, stack.parameters, strict=True):
            held.copy_(torch.where(better[..., None, None], parameter.detach(), held))
    stack.parameters = kept
    return stack, best


def quality_on(lists: RankedLists, scores: Tensor) -> Tensor:
    """Mean NDCG@10 (K, S) of scores (K, S, D) over the queries with a relevant document."""
    copies = scores.shape[0] * scores.shape[1]
    lengths = lists.cu_seqlens.diff().repeat(copies)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    labels = lists.labels.repeat(copies)
    values = ndcg(scores.flatten(), labels, cu_seqlens=cu_seqlens, k=10, ties="average", empty="skip", reduction="none")
    return values.view(*scores.shape[:2], -1).nanmean(-1)


def _dropout(documents: int, widths: Sequence[int], p: float, generators: Sequence[torch.Generator]) -> list[Tensor]:
    if p == 0:
        return []
    draws = [torch.stack([torch.rand(documents, width, generator=g) for g in generators]) for width in widths]
    return [(draw >= p).to(torch.float32).div_(1 - p) for draw in draws]


class _Loss:
    """Sum over students and seeds of the mean loss of their batch's queries."""

    def __init__(self, students: Sequence[Student], seeds: int, documents: int):
        self.alpha = torch.tensor([s.alpha for s in students])
        self.temperature = torch.tensor([s.temperature for s in students])
        self.labels = torch.stack([s.labels for s in students])[:, None]
        self.distilled = [k for k, s in enumerate(students) if s.alpha > 0]
        self.moving = {k: s.target for k, s in enumerate(students) if isinstance(s.target, MovingTarget)}
        fixed = [s.target if isinstance(s.target, Tensor) else torch.full((documents,), torch.nan) for s in students]
        # A row for each seed only where seeds differ.
        self.targets = torch.stack(fixed)[:, None].repeat(1, seeds if self.moving else 1, 1)
        self.labelled: dict[str | None, list[int]] = {}
        for k, s in enumerate(students):
            if s.alpha < 1:
                self.labelled.setdefault(s.pair_weight, []).append(k)

    def move_targets(self, epoch: int, scores: Callable[[], Tensor]) -> None:
        due = [k for k, target in self.moving.items() if epoch in target.when]
        if due:
            z = scores()
            for k in due:
                self.targets[k] = torch.stack([self.moving[k].compute(one) for one in z[k]])

    def __call__(self, z: Tensor, batch: _Batch) -> Tensor:
        total = z.new_zeros(())
        if of := self.distilled:
            # BCE(σ(Δz/τ), σ(Δs/τ)) with a τ for each student is that of τ = 1 on logits divided by τ.
            tau = self.temperature[of, None, None]
            targets = self._gather(self.targets[of], batch) / tau
            total = total + self._mean(distillation_loss, z[of] / tau, targets, self.alpha[of], batch)
        for pair_weight, of in self.labelled.items():
            loss = functools.partial(ranking_loss, pair_weight=pair_weight)
            total = total + self._mean(loss, z[of], self._gather(self.labels[of], batch), 1 - self.alpha[of], batch)
        return total

    @staticmethod
    def _gather(values: Tensor, batch: _Batch) -> Tensor:
        """(K, S, D') of the batch from (K, S, D) or (K, 1, D); NaN in the padding."""
        seed = torch.arange(batch.documents.shape[0]) if values.shape[1] > 1 else torch.tensor([0])
        return torch.where(batch.filled, values[:, seed[:, None], batch.documents], torch.nan)

    @staticmethod
    def _mean(loss: Callable, logits: Tensor, to: Tensor, weight: Tensor, batch: _Batch) -> Tensor:
        lengths = batch.lengths.flatten().repeat(len(weight))
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        losses = loss(logits.flatten(), to.flatten(), cu_seqlens=cu_seqlens, reduction="none")
        queries = batch.lengths.shape[1] - 1
        return (losses.view(len(weight), -1).sum(1) * weight).sum() / queries


class _Adam:
    """Adam (torch.optim.Adam's arithmetic) on stacked parameters (K, S, ...) with a learning rate for each student."""

    def __init__(self, parameters: Sequence[Tensor], learning_rate: Tensor):
        self.parameters, self.steps = parameters, 0
        self.learning_rate = learning_rate[:, None, None, None]
        self.first = [torch.zeros_like(p) for p in parameters]
        self.second = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, schedule: float) -> None:
        self.steps += 1
        (b1, b2), t = BETAS, self.steps
        for p, m, v in zip(self.parameters, self.first, self.second, strict=True):
            m.lerp_(p.grad, 1 - b1)
            v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
            denominator = (v / (1 - b2**t)).sqrt_().add_(EPSILON)
            p -= m / denominator * (self.learning_rate * (schedule / (1 - b1**t)))
            p.grad = None
