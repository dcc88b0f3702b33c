"""The table of options and the terms: one place from which everything else that knows an option is made."""

import inspect
import typing

import pytest
import torch

import pile_fast
from pile_fast import options, terms
from pile_fast.backends import cpp
from pile_fast.options import EnsembleKeywords, EnsembleOptions, LossOptions, PILEKeywords, table

ENSEMBLE, LOSS = table(EnsembleOptions), table(LossOptions)
TERMS = [term for kind in ("distill", "label") for term in terms._TERMS[kind].values()]


def test_what_type_checkers_see_are_the_options():
    assert set(typing.get_type_hints(EnsembleKeywords)) == ENSEMBLE.keys()
    assert set(typing.get_type_hints(PILEKeywords)) == ENSEMBLE.keys() | LOSS.keys()
    for name, hint in typing.get_type_hints(PILEKeywords).items():
        row = (ENSEMBLE | LOSS)[name]
        if row.choices:
            spelt = {c for part in (hint, *typing.get_args(hint)) for c in typing.get_args(part) if isinstance(c, str)}
            spelt |= {a for a in typing.get_args(hint) if isinstance(a, str)}
            assert spelt == {c for c in row.choices if c}, name
            assert (type(None) in typing.get_args(hint)) == (None in row.choices), name


@pytest.mark.parametrize("function", [pile_fast.pile_ensemble, pile_fast.pile_loss, pile_fast.PILELoss])
def test_signatures_and_docstrings_show_every_option(function):
    shown = inspect.signature(function).parameters
    rows = ENSEMBLE if function is pile_fast.pile_ensemble else ENSEMBLE | LOSS
    assert rows.keys() <= shown.keys() and "options" not in shown
    for name, row in rows.items():
        assert shown[name].default == row.default and shown[name].kind is inspect.Parameter.KEYWORD_ONLY
    if function is not pile_fast.PILELoss:
        assert all(f"{name}: {row.help}." in function.__doc__ for name, row in rows.items())
        assert "{options}" not in function.__doc__


@pytest.mark.parametrize(
    "set_of_options, build", [(EnsembleOptions, options.ensemble_options), (LossOptions, options.loss_options)]
)
def test_defaults_fit_and_reach_the_compiled_library(set_of_options, build):
    built = build()
    assert built._fields == tuple(table(set_of_options))
    if not cpp.unavailable():
        from pile_fast.backends import native

        filled = native.struct(cpp._cpu, built)  # an option that the struct lacks is an error
        with pytest.raises(AttributeError):
            filled.no_such_option = 1


def test_a_set_is_built_once():
    assert options.loss_options(alpha=0.5) is options.loss_options(alpha=0.5)
    first, second = options.pile_options(alpha=0.5, iterations=2), options.pile_options(alpha=0.5, iterations=2)
    assert first is second and first == (options.ensemble_options(iterations=2), options.loss_options(alpha=0.5))


def test_an_option_that_is_none_is_named_with_the_nearest():
    with pytest.raises(TypeError, match="iteration: no such option; did you mean 'iterations'?"):
        pile_fast.pile_loss(torch.zeros(1, 2), torch.zeros(1, 2, 1), torch.zeros(1, 2), iteration=3)
    with pytest.raises(TypeError, match="qqq: no such option; the options are iterations, "):
        pile_fast.PILELoss(qqq=3)
    with pytest.raises(TypeError, match="alpha: no such option"):
        pile_fast.pile_ensemble(torch.zeros(1, 2, 1), torch.zeros(1, 2), alpha=0.5)


# -- terms


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.key)
def test_a_term_is_named_written_and_read(term):
    default = term()
    assert terms.find(term.kind, "x", term.name) == default == terms.find(term.kind, "x", default)
    assert terms.find(term.kind, "x", str(default)) == default
    assert terms.by_key(term.key, default.numbers) == default
    assert term.name in terms.names(term.kind) and term.key == f"{term.kind}_{term.name}"
    assert len(term.__doc__) > 100 and "math" in term.__doc__
    for name in term.names:
        value = getattr(default, name)
        choices = term._fields[name].get("choices", ())
        other, text = (
            (choices[1 - choices.index(value)],) * 2 if choices else (7, "7") if isinstance(value, int) else (0.25, "0.25")
        )
        changed = terms.find(term.kind, "x", f"{term.name}:{name}={text}")
        assert getattr(changed, name) == other and changed != default
        assert terms.by_key(term.key, changed.numbers) == changed == terms.find(term.kind, "x", str(changed))
        for wrong in (float("nan"), "1", None, -1):
            with pytest.raises((TypeError, ValueError), match=f"{term.__name__}: {name}: expected"):
                term(**{name: wrong})


def test_a_cutoff_is_written_behind_an_at():
    assert terms.find("label", "x", "lambdarank@10") == terms.LambdaRank(cutoff=10)
    assert terms.find("label", "x", "lambdarank@3:metric=mrr,gain=linear") == terms.LambdaRank(3, "mrr", "linear")


@pytest.mark.parametrize(
    "value, error, words",
    [
        ("l1", ValueError, "distillation: expected one of 'logistic', 'mse', 'kl', got 'l1'"),
        ("l1:temperature=2", ValueError, "distillation: expected one of"),
        ("logistic:temperature=hot", ValueError, "distillation: expected a number after temperature=, got 'hot'"),
        ("logistic:tau=2", ValueError, "distillation: 'logistic' has temperature, got 'tau=2'"),
        ("mse:temperature=2", ValueError, "distillation: 'mse' has no numbers, got 'temperature=2'"),
        ("logistic:", ValueError, "distillation: expected one of 'logistic', 'mse', 'kl', got 'logistic:'"),
        ("kl@10", ValueError, "distillation: 'kl' has no cutoff, got 'kl@10'"),
        (terms.RankNet(), ValueError, "got RankNet(), a term of another kind"),
        (2, TypeError, "distillation: expected a name or a term, got int"),
        (["mse"], TypeError, "distillation: expected a name or a term, got list"),
    ],
)
def test_what_is_no_term_is_refused(value, error, words):
    with pytest.raises(error) as caught:
        pile_fast.PILELoss(distillation=value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "value, words",
    [
        ("lambdarank@", "label_loss: expected one of 'logistic', 'softmax', 'lambdarank', 'approx_ndcg', got 'lambdarank@'"),
        ("lambdarank@ten", "label_loss: expected a whole number after cutoff=, got 'ten'"),
        ("lambdarank@-1", "LambdaRank: cutoff: expected an int >= 0, got -1"),
        ("lambdarank:metric=map", "LambdaRank: metric: expected one of 'ndcg', 'mrr', got 'map'"),
        ("lambdarank@3:cutoff", "label_loss: expected a whole number after cutoff=, got ''"),
    ],
)
def test_a_wrong_cutoff_or_choice_is_refused(value, words):
    with pytest.raises(ValueError) as caught:
        pile_fast.PILELoss(label_loss=value)
    assert str(caught.value).startswith(words)


def test_a_term_as_an_object_and_by_name_are_the_same_loss():
    student, teachers, labels = torch.randn(2, 9), torch.randn(2, 9, 3), torch.randint(0, 3, (2, 9))
    by_name = pile_fast.pile_loss(student, teachers, labels, distillation="logistic:temperature=2")
    assert torch.equal(pile_fast.pile_loss(student, teachers, labels, distillation=terms.Logistic(temperature=2)), by_name)
    assert by_name != pile_fast.pile_loss(student, teachers, labels)
