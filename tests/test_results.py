"""The pages of results say what the results say: those that a program writes, and the figures on those that people write."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
pytestmark = pytest.mark.skipif(not RESULTS.is_dir(), reason="a source distribution comes without the results")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(#[^)]*)?\)")


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def pages():
    return [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")]


@pytest.mark.parametrize("kind", ["speed", "peers"])
def test_the_tables_of_speed_are_those_of_the_run(kind):
    from importlib import import_module

    report = import_module({"speed": "_report", "peers": "_peers_report"}[kind])
    for path in RESULTS.glob(f"*/{kind}.json"):
        assert path.with_suffix(".md").read_text() == report.markdown(json.loads(path.read_text())), path


def test_the_tables_of_boosted_trees_are_those_of_the_run():
    boosting = pytest.importorskip("boosting", exc_type=ImportError)
    found = json.loads((RESULTS / "boosting.json").read_text())
    assert (RESULTS / "boosting.md").read_text() == boosting.markdown(found)
    page = boosting.PAGE.read_text()
    assert page[page.index(boosting.BEGIN) + len(boosting.BEGIN) : page.index(boosting.END)] == boosting.summary(found)


def test_the_tables_of_quality_are_those_of_the_run():
    import _quality_report

    assert (RESULTS / "quality/report.md").read_text() == _quality_report.page(RESULTS / "quality")


def rows(page):
    return [line for line in page.read_text().splitlines() if line.startswith("|")]


def test_the_table_of_the_quality_page_is_that_of_the_run():
    page = (ROOT / "docs/quality.md").read_text()
    (found,) = re.findall(r"<!-- main -->\n(.*?)<!-- /", page, re.DOTALL)
    assert found.count("\n") > 10 and set(found.splitlines()) <= set(rows(RESULTS / "quality/report.md"))


def test_the_figures_of_the_quality_page_stand_in_the_full_tables():
    """Differences, "+0.0123", and values, "0.7071"."""
    figures = set(re.findall(r"[+-]?0\.\d{4}\b", (ROOT / "docs/quality.md").read_text()))
    full = set(re.findall(r"[+-]?0\.\d{4}\b", (RESULTS / "quality/report.md").read_text()))
    assert len(figures) > 20 and figures <= full, figures - full


def test_figures_of_the_performance_page_are_those_of_the_run():
    """A row names its shape first; each figure beside it stands in a row of that shape in the full tables."""
    (folder,) = {path.parent for path in RESULTS.glob("*/speed.json")}
    full: dict[str, set[str]] = {}
    for row in rows(folder / "speed.md") + rows(folder / "peers.md"):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        for shape in cells[:2]:
            full.setdefault(shape, set()).update(cells)
    checked = 0
    for row in rows(ROOT / "docs/performance.md"):
        shape, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        figures = {cell for cell in cells if re.fullmatch(r"[\d.,]+", cell)}
        shape = shape.replace("256 of MQ2008's lengths", "256×121")
        assert not figures or figures <= full[shape], (shape, figures - full[shape])
        checked += len(figures)
    assert checked > 60


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text().lower(), re.MULTILINE)
            assert anchor[1:] in {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}, (target, anchor)
