"""The terms of the student's loss, one small frozen class each.

A term is what users name in `distillation=` or `label_loss=`: its name for the defaults (``"mse"``), its name with numbers
(``"logistic:temperature=2"``, ``"lambdarank@10"``), or an object (``Logistic(temperature=2)``). It holds numbers and knows no
arithmetic: that is in `pile_fast.reference` for every term, and in one file per term of each backend's kernels, found by the
term's `key`.

To add one, see CONTRIBUTING.md.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, TypeVar

from typing_extensions import Self

from pile_fast import checks

T = TypeVar("T", bound="Term")


def number(default: float, help: str, **bounds: Any) -> Any:
    """A field of a term: a number with its default, its meaning and its bounds (`pile_fast.checks.number`'s)."""
    return dataclasses.field(default=default, metadata={"help": help, "check": functools.partial(checks.number, **bounds)})


def cutoff(help: str) -> Any:
    """A field of a term: a rank, 0 = none; users may write it as ``"name@10"``."""
    return dataclasses.field(default=0, metadata={"help": help, "check": checks.count})


def choice(default: str, choices: tuple[str, ...], help: str) -> Any:
    """A field of a term: one of a few strings. As a number it is its place among them."""
    check = functools.partial(checks.choice, choices=choices)
    return dataclasses.field(default=default, metadata={"help": help, "check": check, "choices": choices})


@dataclasses.dataclass(frozen=True)
class Term:
    """What all terms have in common. Raises TypeError or ValueError for numbers that do not fit.

    Attributes:
        kind: "distill", against target logits, or "label", against labels.
        name: what users call it; unique within its kind.
        key: `kind` and `name`, what kernels call it.
        names: of its numbers.
        has_gains: whether it takes labels as gains: none may be negative.
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    key: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    has_gains: ClassVar[bool] = False
    _fields: ClassVar[dict[str, dict[str, Any]]]  # what `number` and the others noted

    def __post_init__(self) -> None:
        for name in self.names:
            object.__setattr__(self, name, self._fields[name]["check"](f"{type(self).__name__}: {name}", getattr(self, name)))

    @property
    def numbers(self) -> list[float]:
        """Its numbers, in the order of `names`."""
        values = {name: getattr(self, name) for name in self.names}
        choices = {name: field.get("choices", ()) for name, field in self._fields.items()}
        return [float(choices[name].index(value) if choices[name] else value) for name, value in values.items()]

    @classmethod
    def of_numbers(cls, numbers: list[float]) -> Self:
        """The term with these `numbers`."""
        values: list[Any] = []
        for name, number in zip(cls.names, numbers, strict=True):
            field = cls._fields[name]
            whole = field["check"] is checks.count
            values.append(field["choices"][int(number)] if "choices" in field else int(number) if whole else number)
        return cls(*values)

    def __str__(self) -> str:
        """The form that `pile_fast.terms.find` reads."""
        values = ((name, getattr(self, name)) for name in self.names)
        numbers = ",".join(f"{name}={value if isinstance(value, str) else format(value, 'g')}" for name, value in values)
        return f"{self.name}:{numbers}" if numbers else self.name


_TERMS: dict[str, dict[str, type[Term]]] = {"distill": {}, "label": {}}
_DEFAULTS: dict[str, dict[str, Term]] = {"distill": {}, "label": {}}


def register(term: type[T]) -> type[T]:
    """Make a term known by its name."""
    term.key = f"{term.kind}_{term.name}"
    term.names = tuple(field.name for field in dataclasses.fields(term))
    term._fields = {field.name: dict(field.metadata) for field in dataclasses.fields(term)}
    _TERMS[term.kind][term.name] = term
    _DEFAULTS[term.kind][term.name] = term()
    return term


def names(kind: str) -> tuple[str, ...]:
    """The names of a kind's terms."""
    return tuple(_TERMS[kind])


def defaults(kind: str) -> list[Term]:
    """Each of a kind's terms, with its default numbers."""
    return list(_DEFAULTS[kind].values())


def by_key(key: str, numbers: list[float]) -> Term:
    """The term of a key and its numbers: how a term comes back from a registered op."""
    kind, _, name = key.partition("_")
    return _TERMS[kind][name].of_numbers(numbers)


def find(kind: str, argument: str, value: object) -> Term:
    """The term that a user's value stands for: a term, its name, ``"name@cutoff"`` or ``"name:number=value,..."``.

    Raises:
        TypeError, ValueError: there is none such, or its numbers do not fit; the message begins with `argument`.
    """
    if isinstance(value, Term):
        if value.kind != kind:
            raise ValueError(f"{argument}: expected one of {_expected(kind)}, got {value!r}, a term of another kind")
        return value
    if not isinstance(value, str):
        raise TypeError(f"{argument}: expected a name or a term, got {type(value).__name__}")
    if value in _DEFAULTS[kind]:
        return _DEFAULTS[kind][value]
    name, _, rest = value.partition(":")
    name, at, rank = name.partition("@")
    term = _TERMS[kind].get(name)
    if term is None or not (rest or rank):
        raise ValueError(f"{argument}: expected one of {_expected(kind)}, got {value!r}")
    if at and "cutoff" not in term.names:
        raise ValueError(f"{argument}: {name!r} has no cutoff, got {value!r}")
    given: dict[str, Any] = {}
    for part in [f"cutoff={rank}"] * bool(at) + rest.split(",") * bool(rest):
        number, _, text = part.partition("=")
        if number not in term.names:
            raise ValueError(f"{argument}: {name!r} has {', '.join(term.names) or 'no numbers'}, got {part!r}")
        field = term._fields[number]
        read = str if "choices" in field else int if field["check"] is checks.count else float
        try:
            given[number] = read(text)
        except ValueError:
            kind_of_number = "a whole number" if read is int else "a number"
            raise ValueError(f"{argument}: expected {kind_of_number} after {number}=, got {text!r}") from None
    return term(**given)


def _expected(kind: str) -> str:
    return ", ".join(map(repr, _TERMS[kind]))


@register
@dataclasses.dataclass(frozen=True)
class Logistic(Term):
    r"""Distillation "logistic": the student's pairwise preferences equal the target's.

    Per query, the mean over the pairs of documents with a target of

    .. math:: \operatorname{BCE}\left(\sigma\left((z_i - z_j) / \tau\right), \sigma\left((s_i - s_j) / \tau\right)\right).

    Soft RankNet (Burges et al., ICML 2005). The default: it asks for the target's preferences, not for its scale.
    """

    kind = "distill"
    name = "logistic"
    temperature: float = number(1.0, "τ, the unit in which differences are measured", low=0.0, open_low=True)


@register
@dataclasses.dataclass(frozen=True)
class MSE(Term):
    r"""Distillation "mse": the student's differences equal the target's.

    Per query, the mean over the pairs of documents with a target of :math:`\left((z_i - z_j) - (s_i - s_j)\right)^2`.
    MarginMSE over all pairs (Hofstätter et al., arXiv:2010.02666), in closed form and O(n).
    """

    kind = "distill"
    name = "mse"


@register
@dataclasses.dataclass(frozen=True)
class KL(Term):
    r"""Distillation "kl": the student's distribution over the list equals the target's.

    Per query, over the documents with a target,

    .. math:: \tau^2 \operatorname{KL}\left(\operatorname{softmax}(s / \tau) \,\|\, \operatorname{softmax}(z / \tau)\right).

    ListNet (Cao et al., ICML 2007) on teacher logits, with the temperature of Hinton et al. (arXiv:1503.02531): τ² keeps the
    size of the gradient. It looks at the top of the list most; "logistic" looks at all pairs alike. O(n).
    """

    kind = "distill"
    name = "kl"
    temperature: float = number(1.0, "τ, the larger the more the rest of the list counts", low=0.0, open_low=True)


@register
@dataclasses.dataclass(frozen=True)
class RankNet(Term):
    r"""Label loss "logistic": documents with higher labels get higher logits.

    Per query, over the pairs P of labelled documents with y_i > y_j, weighted by `pair_weight` ω,

    .. math:: \frac{1}{\sum_P \omega_{ij}} \sum_P \omega_{ij} \operatorname{softplus}(-(z_i - z_j)).

    RankNet (Burges et al., ICML 2005), normalised per query.
    """

    kind = "label"
    name = "logistic"


def _gain(default: str) -> Any:
    return choice(default, ("exp2", "linear"), 'a document\'s gain: "exp2" = 2^y − 1, or "linear" = y; labels must be >= 0')


@register
@dataclasses.dataclass(frozen=True)
class Softmax(Term):
    r"""Label loss "softmax": the list's probability goes to the relevant documents.

    Per query, with π_i the documents' shares of the gain,

    .. math:: -\sum_i \pi_i \log \operatorname{softmax}(z / \tau)_i, \qquad \pi_i = \frac{g_i}{\sum_j g_j}.

    ListNet (Cao et al., ICML 2007); with one relevant document it is InfoNCE (van den Oord et al., arXiv:1807.03748), with
    in-batch negatives if a query's list holds them. O(n). A query without gain counts for nothing.
    """

    kind = "label"
    name = "softmax"
    has_gains = True
    temperature: float = number(1.0, "τ", low=0.0, open_low=True)
    gain: str = _gain("linear")


@register
@dataclasses.dataclass(frozen=True)
class LambdaRank(Term):
    r"""Label loss "lambdarank": RankNet's pairs, each by what swapping its documents would change in the metric.

    Per query, with the gains g, and d_i the discount at document i's rank by the student, 0 past the cutoff,

    .. math:: \frac{1}{\max \text{DCG}} \sum_P (g_i - g_j) \, |d_i - d_j| \operatorname{softplus}(-(z_i - z_j)).

    LambdaRank (Burges et al., NIPS 2006) as the loss of LambdaLoss (Wang et al., CIKM 2018). Metric "ndcg" discounts by
    1 / log2(1 + rank); "mrr" by 1 / rank, and every label > 0 has gain 1, as in TF-Ranking. No gradient goes through the
    ranks. Documents with equal logits take the mean over all their orders, so that the order of rows never matters.
    `pair_weight` does not apply.
    """

    kind = "label"
    name = "lambdarank"
    has_gains = True
    cutoff: int = cutoff("k of NDCG@k, the last rank that counts; 0 = all ranks")
    metric: str = choice("ndcg", ("ndcg", "mrr"), 'whose change weighs a pair: "ndcg", or "mrr" of labels > 0')
    gain: str = _gain("exp2")


@register
@dataclasses.dataclass(frozen=True)
class ApproxNDCG(Term):
    r"""Label loss "approx_ndcg": one minus NDCG, with ranks that are smooth in the logits.

    Per query, over the labelled documents, with the gains g,

    .. math:: 1 - \frac{1}{\max \text{DCG}} \sum_i \frac{g_i}{\log_2(1 + r_i)}, \qquad
              r_i = \frac{1}{2} + \sum_j \sigma\left((z_j - z_i) / \tau\right).

    ApproxNDCG (Qin et al., Information Retrieval 2010), with the temperature of Bruch et al. (SIGIR 2019). A query without gain
    counts for nothing.
    """

    kind = "label"
    name = "approx_ndcg"
    has_gains = True
    temperature: float = number(0.1, "τ, the smaller the nearer to the ranks, and the rougher", low=0.0, open_low=True)
    gain: str = _gain("exp2")
