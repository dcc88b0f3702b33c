"""The one table of options: name, type, default, check and meaning of each, and which op takes it.

`EnsembleOptions` and `LossOptions` are the table: a field per option, its row in the annotation. From it come the checks, the
schemas of the registered ops (`pile_fast.autograd`), the structs of the native backends (filled by name), the signatures and
docstrings of the public functions, the flags of the commands and docs/options.md. To add an option: a row here, its keyword for
type checkers below, a member of the struct in csrc/include/pile/options.h, and whoever computes with it.

A set of options is a flat `NamedTuple`, so that it can be unpacked into an op's arguments. The builders validate once per
distinct set (they are cached): on later calls they cost a dictionary look-up, which short lists feel.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, TypeVar

import torch

from pile_fast import checks, terms
from pile_fast.terms import Term

DEFAULT_ITERATIONS = {"shared": 40, "document": 10, "query": 10}
DEFAULT_STEP_SIZE = {"shared": 3.0, "document": 3.0, "query": 1.0}

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Option:
    """A row of the table.

    Attributes:
        default: as users give it.
        check: (name, value) → the value as it is used; TypeError or ValueError if it does not fit.
        help: one line for docstrings, command lines and the reference page.
        choices: what it may be, if it is one of a few strings (or None).
        type: of what a command line's text becomes before the check.
    """

    default: Any
    check: Callable[[str, Any], Any]
    help: str
    choices: tuple[str | None, ...] = ()
    type: Callable[[str], Any] = str


def _number(default: float | None, help: str, **bounds: Any) -> Option:
    return Option(default, functools.partial(checks.number, **bounds), help, type=float)


def _choice(choices: tuple[str | None, ...], help: str) -> Option:
    """The first of the choices is the default."""
    return Option(choices[0], functools.partial(checks.choice, choices=choices), help, choices)


def _term(kind: str, what: str) -> Option:
    *names, last = (f'"{name}"' for name in terms.names(kind))
    example = next((f', with numbers as in "{default}"' for default in terms.defaults(kind) if default.names), "")
    help = f"{what}: {', '.join(names)} or {last}{example}, or an object of `pile_fast.terms`"
    return Option("logistic", functools.partial(terms.find, kind), help)


_PAIR_WEIGHT = _choice(
    (None, "label_gap", "gain_gap"),
    'ω of label pairs: None = 1, "label_gap" = y_i − y_j, "gain_gap" = 2^y_i − 2^y_j, for labels of any size',
)
_PAIRWISE = _choice(
    ("auto", "direct", "chebyshev"),
    'how pairs are summed: "direct" O(n²), "chebyshev" O(n), or "auto" by a cost model',
)


class EnsembleOptions(NamedTuple):
    """Options of the iterative reweighting, validated. `pair_weight` is "none" where the user gave None."""

    iterations: Annotated[
        int,
        Option(
            None, checks.count, 'number of updates T; 0 keeps the mean, or `prior`; None = 40 for "shared", 10 for the others',
            type=int,
        ),
    ]  # fmt: skip
    step_size: Annotated[float, _number(None, 'η of an update; None = 3 for "shared" and "document", 1 for "query"', low=0.0)]
    granularity: Annotated[
        str,
        _choice(
            ("shared", "document", "query"),
            'whose the teachers\' weights are: "shared" by all queries, each "query"\'s, or each "document"\'s',
        ),
    ]
    shrinkage: Annotated[
        float, _number(1.0, 'κ, pulls "shared" weights to the mean, the more the fewer queries have labels; 0 = not', low=0.0)
    ]
    normalize: Annotated[
        str,
        _choice(
            ("zscore", "center", "none", "minmax", "logit"),
            'calibration per query and teacher: "zscore", "center", "none", "minmax" to [0, 1], or "logit" of probabilities, '
            "z-scored",
        ),
    ]
    temperature: Annotated[float, _number(1.0, "unit of differences of ensemble logits, > 0", low=0.0, open_low=True)]
    margin: Annotated[float, _number(0.0, "difference that a pair of the ensemble should reach")]
    pair_weight: Annotated[str, _PAIR_WEIGHT]
    pairwise: Annotated[str, _PAIRWISE]


class LossOptions(NamedTuple):
    """Options of the student's loss, validated. `pair_weight` is "none" where the user gave None."""

    alpha: Annotated[float, _number(1.0, "weight of the distillation against the labels, in [0, 1]", low=0.0, high=1.0)]
    distillation: Annotated[Term, _term("distill", "how the student follows the ensemble")]
    label_loss: Annotated[Term, _term("label", "how it follows the labels")]
    pair_weight: Annotated[str, _PAIR_WEIGHT]
    reduction: Annotated[
        str,
        _choice(("mean", "sum", "none"), '"mean" over the queries that count in a term in use, "sum", or "none" for (Q,)'),
    ]
    pairwise: Annotated[str, _PAIRWISE]


# What type checkers and editors know of the keywords; tests/test_options.py holds these against the table.
class EnsembleKeywords(TypedDict, total=False):
    """Keywords of `EnsembleOptions`."""

    iterations: int | None
    step_size: float | None
    granularity: Literal["shared", "document", "query"]
    shrinkage: float
    normalize: Literal["zscore", "center", "none", "minmax", "logit"]
    temperature: float
    margin: float
    pair_weight: Literal["label_gap", "gain_gap"] | None
    pairwise: Literal["auto", "direct", "chebyshev"]


class PILEKeywords(EnsembleKeywords, total=False):
    """Keywords of `EnsembleOptions` and `LossOptions`."""

    alpha: float
    distillation: str | Term
    label_loss: str | Term
    reduction: Literal["mean", "sum", "none"]


Options = type[EnsembleOptions] | type[LossOptions]


@functools.cache
def table(*sets: Options) -> dict[str, Option]:
    """The rows of one set or of several, by name."""
    rows: dict[str, Option] = {}
    for options in sets:
        for name, hint in typing.get_type_hints(options, include_extras=True).items():
            rows.setdefault(name, hint.__metadata__[0])
    return rows


_ENSEMBLE, _LOSS = table(EnsembleOptions), table(LossOptions)
_BOTH = table(EnsembleOptions, LossOptions)


def _refuse_unknown(given: Mapping[str, Any], known: Mapping[str, Option]) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the options are {', '.join(known)}"
            raise TypeError(f"{name}: no such option; {hint}")


def _ensemble(given: Mapping[str, Any]) -> EnsembleOptions:
    granularity = _ENSEMBLE["granularity"]
    by = granularity.check("granularity", given.get("granularity", granularity.default))
    given = {**given}
    for name, defaults in (("iterations", DEFAULT_ITERATIONS), ("step_size", DEFAULT_STEP_SIZE)):
        if given.get(name) is None:
            given[name] = defaults[by]
    return EnsembleOptions(*[row.check(name, given.get(name, row.default)) for name, row in _ENSEMBLE.items()])


def _loss(given: Mapping[str, Any]) -> LossOptions:
    return LossOptions(*[row.check(name, given.get(name, row.default)) for name, row in _LOSS.items()])


def cached(builder: Callable[..., T]) -> Callable[..., T]:
    """Cache a builder by its arguments; an unhashable argument goes to the builder itself, whose check names it."""
    kept = functools.lru_cache(maxsize=256, typed=True)(builder)

    @functools.wraps(builder)
    def build(*arguments: Any) -> T:
        if torch.compiler.is_compiling():  # tracers cannot look into the cache
            return builder(*arguments)
        try:
            return kept(*arguments)
        except TypeError:
            return builder(*arguments)

    return build


def _by_name(names_and_values: tuple[Any, ...], known: Mapping[str, Option]) -> dict[str, Any]:
    """What was given, from the names and, behind them, the values."""
    half = len(names_and_values) // 2
    given = dict(zip(names_and_values[:half], names_and_values[half:], strict=True))
    _refuse_unknown(given, known)
    return given


@cached
def _ensemble_options(*names_and_values: Any) -> EnsembleOptions:
    return _ensemble(_by_name(names_and_values, _ENSEMBLE))


@cached
def _loss_options(*names_and_values: Any) -> LossOptions:
    return _loss(_by_name(names_and_values, _LOSS))


@cached
def _pile_options(*names_and_values: Any) -> tuple[EnsembleOptions, LossOptions]:
    given = _by_name(names_and_values, _BOTH)
    return _ensemble(given), _loss(given)


def ensemble_options(**given: Any) -> EnsembleOptions:
    """The ensemble's options, from keywords; those not given take their defaults.

    Raises:
        TypeError, ValueError: a value does not fit, or there is no such option; the message names it.
    """
    return _ensemble_options(*given, *given.values())


def loss_options(**given: Any) -> LossOptions:
    """The loss's options, see `ensemble_options`."""
    return _loss_options(*given, *given.values())


def pile_options(**given: Any) -> tuple[EnsembleOptions, LossOptions]:
    """Both sets from one set of keywords, see `ensemble_options`; what they share goes to both."""
    return _pile_options(*given, *given.values())


def documented(*sets: Options, without: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Show the options that a function takes as keywords: in its signature, and in its docstring in place of "{options}"."""
    rows = {name: row for name, row in table(*sets).items() if name not in without}  # type: ignore[arg-type]

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=row.default) for name, row in rows.items()]
        function.__signature__ = signature.replace(parameters=own + keywords)  # type: ignore[attr-defined]
        if function.__doc__:
            indent = " " * 8
            lines = f"\n{indent}".join(f"{name}: {row.help}." for name, row in rows.items())
            function.__doc__ = function.__doc__.replace("{options}", lines)
        return function

    return decorate
