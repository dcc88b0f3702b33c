"""Many `FeatureRanker`s trained at once: one stack of networks, batched matrix products, one loss call for all of them.

K students × S seeds. Within a seed everything random is the same for all K students (initial weights, order of the queries,
dropout), so that chance blurs their differences less. Targets are computed once, outside, because they do not depend on the
student; those that do (AE-KD, GOVERN) are computed again at the start of some epochs.
"""

from __future__ import annotations

import copy
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

STEPS_PER_EPOCH = 15  # in every collection, whatever its size: 32 queries a step on MQ2008
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
        temperature: τ of the distillation; of the label loss "softmax".
        distillation: "logistic", "mse" or "kl".
        label_loss: "logistic" or "softmax".
        pair_weight: ω of the logistic label loss.
        learning_rate: of Adam, falling linearly to 0.
    """

    target: Tensor | MovingTarget | None
    labels: Tensor
    alpha: float = 1.0
    temperature: float = 1.0
    distillation: str = "logistic"
    label_loss: str = "logistic"
    pair_weight: str | None = None
    learning_rate: float = 1e-2


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

    def holding(self, parameters: list[Tensor]) -> Stack:
        """One like this with other parameters."""
        other = copy.copy(self)
        other.parameters = parameters
        return other

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
    for queries in orders.split(math.ceil(len(lists) / STEPS_PER_EPOCH), 1):
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
    validations: Sequence[RankedLists],
    *,
    epochs: int = 10,
    hidden_sizes: Sequence[int] = (32,),
    dropout: float = 0.0,
) -> list[tuple[Stack, Tensor]]:
    """Train every student with every seed; each is kept as it was after its best epoch on the validation queries.

    Args:
        validations: the validation queries: all, then with fewer labels.

    Returns:
        For each of `validations` the stack, and the NDCG@10 (K, S) on them.
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

    counted = [_labelled_queries(validation) for validation in validations]
    best = [torch.full((len(students), len(seeds)), -math.inf, dtype=torch.float64) for _ in validations]
    kept = [[p.detach().clone() for p in stack.parameters] for _ in validations]
    steps = epochs * len(_batches(lists, [torch.Generator()]))
    for epoch in range(epochs):
        loss.move_targets(epoch, lambda: stack.scores(lists.features))
        for batch in _batches(lists, generators):
            masks = _dropout(batch.documents.shape[1], hidden_sizes, dropout, generators)
            loss(stack.logits(features[batch.documents], masks), batch).backward()
            adam.step(1 - adam.steps / steps)
        values = values_on(validations[0], stack.scores(validations[0].features))
        for v, queries in enumerate(counted):
            quality = values[..., queries].nanmean(-1)
            better = quality > best[v]
            best[v] = torch.where(better, quality, best[v])
            for held, parameter in zip(kept[v], stack.parameters, strict=True):
                held.copy_(torch.where(better[..., None, None], parameter.detach(), held))
    return [(stack.holding(parameters), quality) for parameters, quality in zip(kept, best, strict=True)]


def quality_on(lists: RankedLists, scores: Tensor) -> Tensor:
    """Mean NDCG@10 (K, S) of scores (K, S, D) over the queries with a relevant document."""
    return values_on(lists, scores).nanmean(-1)


def values_on(lists: RankedLists, scores: Tensor) -> Tensor:
    """NDCG@10 (K, S, Q) of scores (K, S, D); NaN for a query without a relevant document."""
    copies = scores.shape[0] * scores.shape[1]
    lengths = lists.cu_seqlens.diff().repeat(copies)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    labels = lists.labels.repeat(copies)
    values = ndcg(scores.flatten(), labels, cu_seqlens=cu_seqlens, k=10, ties="average", empty="skip", reduction="none")
    return values.view(*scores.shape[:2], -1)


def _labelled_queries(lists: RankedLists) -> Tensor:
    return torch.tensor([bool(y.isfinite().any()) for y in lists.labels.split(lists.cu_seqlens.diff().tolist())])


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
        self.moving = {k: s.target for k, s in enumerate(students) if isinstance(s.target, MovingTarget)}
        fixed = [s.target if isinstance(s.target, Tensor) else torch.full((documents,), torch.nan) for s in students]
        # A row for each seed only where seeds differ.
        self.targets = torch.stack(fixed)[:, None].repeat(1, seeds if self.moving else 1, 1)
        self.distilled: dict[str, list[int]] = {}
        self.labelled: dict[tuple[str, str | None], list[int]] = {}
        for k, s in enumerate(students):
            if s.alpha > 0:
                self.distilled.setdefault(s.distillation, []).append(k)
            if s.alpha < 1:
                self.labelled.setdefault((s.label_loss, s.pair_weight), []).append(k)

    def move_targets(self, epoch: int, scores: Callable[[], Tensor]) -> None:
        due = [k for k, target in self.moving.items() if epoch in target.when]
        if due:
            z = scores()
            for k in due:
                self.targets[k] = torch.stack([self.moving[k].compute(one) for one in z[k]])

    def __call__(self, z: Tensor, batch: _Batch) -> Tensor:
        total = z.new_zeros(())
        for kind, of in self.distilled.items():
            # A τ for each student: the loss of τ = 1 on logits divided by τ. "mse" has no τ; there it scales the target.
            tau = self.temperature[of, None, None]
            loss = functools.partial(distillation_loss, kind=kind)
            student = z[of] if kind == "mse" else z[of] / tau
            total = total + self._mean(loss, student, self._gather(self.targets[of], batch) / tau, self.alpha[of], batch)
        for (kind, pair_weight), of in self.labelled.items():
            tau = 1.0 if kind == "logistic" else self.temperature[of, None, None]
            loss = functools.partial(ranking_loss, kind=kind, pair_weight=pair_weight)
            total = total + self._mean(loss, z[of] / tau, self._gather(self.labels[of], batch), 1 - self.alpha[of], batch)
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
