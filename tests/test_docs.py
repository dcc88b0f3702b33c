"""Pages that can be checked against the code are. `python tests/test_docs.py` writes docs/options.md anew."""

import dataclasses
import functools
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import test_floors as floors

from pile_fast import checks, terms
from pile_fast.options import EnsembleOptions, LossOptions, Option, table

ROOT = Path(__file__).parents[1]
SOURCES = ("pile_fast", "kernels", "csrc", "benchmarks", "tests")
OPTIONS_PAGE = """# Options and terms

Every option of the ensemble and of the losses, with its default. `make options-page` writes this page from the table in
`pile_fast/options.py` and the classes in `pile_fast/terms.py`. [algorithm.md](algorithm.md) has the formulas.

`pile_loss` and `PILELoss` take all of them, `pile_ensemble` those of the ensemble. `distillation_loss` and `ranking_loss` take
a term as `kind`, `reduction` and `pairwise`; `ranking_loss` takes `pair_weight` too. The commands have them as flags, such as
`--step-size` for `step_size`, except `pairwise` and `reduction`.

## Of the ensemble

{ensemble}

## Of the student's loss

`pair_weight` and `pairwise` hold for the loss as well.

{loss}

## Terms

A term is given by its name for the defaults (`distillation="logistic"`), by its name with numbers
(`distillation="logistic:temperature=2"`), or as an object (`distillation=pile_fast.terms.Logistic(temperature=2)`).
{terms}"""


def accepted(check) -> str:
    """What a check lets through, in words."""
    function, bounds = (check.func, check.keywords) if isinstance(check, functools.partial) else (check, {})
    if function is checks.count:
        return "whole number ≥ 0"
    if function is checks.number:
        low = f" {'>' if bounds.get('open_low') else '≥'} {bounds['low']:g}" if "low" in bounds else ""
        return f"number{low}" + (f" and ≤ {bounds['high']:g}" if "high" in bounds else "")
    if function is terms.find:
        return "a term: " + ", ".join(f"`{name}`" for name in terms.names(check.args[0]))
    return ", ".join(f"`{choice!r}`".replace("'", '"') for choice in bounds["choices"])


def rows(options: dict[str, Option]) -> str:
    lines = ["| option | default | may be | what it is |", "| --- | --- | --- | --- |"]
    for name, row in options.items():
        default = repr(row.default).replace("'", '"')
        lines.append(f"| `{name}` | `{default}` | {accepted(row.check)} | {row.help} |")
    return "\n".join(lines)


def term(kind: type[terms.Term]) -> str:
    text = lambda value: f"`{value}`" if isinstance(value, str) else format(value, "g")  # noqa: E731
    body = inspect.cleandoc(kind.__doc__).split("\n", 1)
    formula = re.sub(r"\.\. math:: (.*(?:\n {6,}.*)*)", lambda found: f"$${' '.join(found[1].split())}$$", body[1])
    formula = re.sub(r":math:`([^`]*)`", r"$\1$", formula)
    argument = {"distill": "distillation", "label": "label_loss"}[kind.kind]
    numbers = [
        f"- `{field.name}` = {text(field.default)}: {field.metadata['help']}; {accepted(field.metadata['check'])}"
        for field in dataclasses.fields(kind)
    ]
    title = body[0].partition(": ")[2]
    title = title[:1].upper() + title[1:]
    parts = [f'### `{argument}="{kind.name}"`: `{kind.__name__}`', title, formula.strip(), "\n".join(numbers)]
    return "\n\n".join(part for part in parts if part)


def options_page() -> str:
    ensemble, loss = table(EnsembleOptions), table(LossOptions)
    kinds = [type(terms.find(kind, kind, name)) for kind in ("distill", "label") for name in terms.names(kind)]
    return OPTIONS_PAGE.format(
        ensemble=rows(ensemble),
        loss=rows({name: row for name, row in loss.items() if name not in ensemble}),
        terms="".join(f"\n{term(kind)}\n" for kind in kinds),
    )


def test_the_page_of_options_is_that_of_the_table():
    assert (ROOT / "docs/options.md").read_text() == options_page()


def in_sources(pattern: str) -> set[str]:
    files = [path for folder in SOURCES for path in ROOT.glob(f"{folder}/**/*") if path.suffix in (".py", ".h", ".cpp", ".cu")]
    return {found for path in (*files, ROOT / "setup.py", ROOT / "Makefile") for found in re.findall(pattern, path.read_text())}


def test_the_list_of_pages_has_all_of_them():
    listed = re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs/README.md").read_text())
    assert sorted([*listed, "README.md"]) == sorted(path.name for path in ROOT.glob("docs/*.md"))


def test_pages_that_sources_name_are_there():
    pages = in_sources(r"docs/\w+\.md")
    assert len(pages) > 5 and all((ROOT / page).exists() for page in pages)


def test_the_page_of_environment_variables_has_all_of_them_and_no_others():
    used = in_sources(r"PILE_FAST_[A-Z_]+")
    found = re.findall(r"^\| `(\w+)`", (ROOT / "docs/environment.md").read_text(), re.MULTILINE)
    assert sorted(found) == sorted(used)


def test_the_loss_that_the_page_for_contributors_adds():
    """In a process of its own, as what is registered stays."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    term, function = map(textwrap.dedent, blocks)
    code = f"""if True:
        import torch, pile_fast
        from pile_fast import reference, terms
        exec({term!r}, vars(terms))
        exec({function!r}, vars(reference))
        reference.TERMS["distill_huber"] = reference.distill_huber
        student = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
        target = 3 * torch.randn(3, 7)
        loss = lambda z: pile_fast.distillation_loss(z, target, kind="huber:delta=2")
        assert torch.autograd.gradcheck(loss, student)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_drawing_of_the_floors_is_that_which_a_test_holds():
    (drawing,) = re.findall(r"```\n(doors .*?)```", (ROOT / "docs/architecture.md").read_text(), re.DOTALL)
    floor, drawn = "", {}
    for line in drawing.splitlines():
        if not line.startswith("-"):
            floor = line[:18].strip() or floor
            drawn.setdefault(floor, []).extend(line[18:].split(" · "))
    assert list(drawn.items()) == [(floor, list(rooms)) for floor, rooms in reversed(floors.FLOORS.items())]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_files_that_a_page_names_are_there(page):
    names = re.findall(r"`((?:benchmarks|csrc|docs|kernels|pile_fast|tests)/[\w./]*|\w+\.py)`", (ROOT / page).read_text())
    assert len(names) > 10
    missing = [name for name in names if "huber" not in name and not (ROOT / name).exists()]
    assert not missing


if __name__ == "__main__":
    (ROOT / "docs/options.md").write_text(options_page())
