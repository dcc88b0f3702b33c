"""The terms of the student's loss, one small frozen class each.

A term is what users name in `distillation=` or `label_loss=`: its name for the defaults (``"mse"``), its name with numbers
(``"logistic:temperature=2"``), or an object (``Logistic(temperature=2)``). It holds numbers and knows no arithmetic: that is in
`pile_fast.reference` for every term, and in one file per term of each backend's kernels, found by the term's `key`.

To add one, see CONTRIBUTING.md.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from pile_fast import checks

T = TypeVar("T", bound="Term")


def number(default: float, help: str, **bounds: Any) -> Any:
    """A field of a term: a number with its default, its meaning and its bounds (`pile_fast.checks.number`'s)."""
    return dataclasses.field(default=default, metadata={"help": help, "check": functools.partial(checks.number, **bounds)})


@dataclasses.dataclass(frozen=True)
class Term:
    """What all terms have in common. Raises TypeError or ValueError for numbers that do not fit.

    Attributes:
        kind: "distill", against target logits, or "label", against labels.
        name: what users call it; unique within its kind.
        key: `kind` and `name`, what kernels call it.
        names: of its numbers.
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    key: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    _checks: ClassVar[dict[str, Callable[[str, Any], float]]]

    def __post_init__(self) -> None:
        for name in self.names:
            object.__setattr__(self, name, self._checks[name](f"{type(self).__name__}: {name}", getattr(self, name)))

    @property
    def numbers(self) -> list[float]:
        """Its numbers, in the order of `names`."""
        return [getattr(self, name) for name in self.names]

    def __str__(self) -> str:
        """The form that `pile_fast.terms.find` reads."""
        numbers = ",".join(f"{name}={value:g}" for name, value in zip(self.names, self.numbers, strict=True))
        return f"{self.name}:{numbers}" if numbers else self.name


_TERMS: dict[str, dict[str, type[Term]]] = {"distill": {}, "label": {}}
_DEFAULTS: dict[str, dict[str, Term]] = {"distill": {}, "label": {}}


def register(term: type[T]) -> type[T]:
    """Make a term known by its name."""
    term.key = f"{term.kind}_{term.name}"
    term.names = tuple(field.name for field in dataclasses.fields(term))
    term._checks = {field.name: field.metadata["check"] for field in dataclasses.fields(term)}
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
    return _TERMS[kind][name](*numbers)


def find(kind: str, argument: str, value: object) -> Term:
    """The term that a user's value stands for: a term, its name, or ``"name:number=value,..."``.

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
    name, colon, rest = value.partition(":")
    if not colon or name not in _TERMS[kind]:
        raise ValueError(f"{argument}: expected one of {_expected(kind)}, got {value!r}")
    term = _TERMS[kind][name]
    numbers = {}
    for part in rest.split(","):
        number, _, text = part.partition("=")
        if number not in term.names:
            raise ValueError(f"{argument}: {name!r} has {', '.join(term.names) or 'no numbers'}, got {part!r}")
        try:
            numbers[number] = float(text)
        except ValueError:
            raise ValueError(f"{argument}: expected a number after {number}=, got {text!r}") from None
    return term(**numbers)


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
class RankNet(Term):
    r"""Label loss "logistic": documents with higher labels get higher logits.

    Per query, over the pairs P of labelled documents with y_i > y_j, weighted by `pair_weight` ω,

    .. math:: \frac{1}{\sum_P \omega_{ij}} \sum_P \omega_{ij} \operatorname{softplus}(-(z_i - z_j)).

    RankNet (Burges et al., ICML 2005), normalised per query.
    """

    kind = "label"
    name = "logistic"
