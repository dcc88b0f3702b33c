"""The worked example of learning from clicks: the page's code, its table, and that the weights do what it says."""

import json
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def clicks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return pytest.importorskip("clicks")


def test_weighted_clicks_beat_unweighted_ones(clicks):
    found = clicks.compare(0, queries=100, steps=60)
    logger, unweighted, weighted, truth = found.values()
    assert logger + 0.1 < unweighted < weighted - 0.05 < truth


def test_without_bias_weights_are_ones_and_clicks_are_enough(clicks):
    found = clicks.compare(0, queries=100, steps=60, bias=0.0)
    _, unweighted, weighted, truth = found.values()
    assert unweighted == weighted > truth - 0.03


def test_the_gradient_is_right_in_expectation(clicks):
    """With the expected clicks it is that of the chances of a click if everyone looked at everything, but for a factor."""
    log = clicks.generate(5, 1, 1.0, torch.Generator().manual_seed(1))
    chances = 0.05 + 0.95 * (2**log.relevance - 1) / 15
    expected = log.propensity * chances
    z = torch.randn(5, clicks.DOCUMENTS, requires_grad=True)

    def gradient(labels, weights=None):
        loss = clicks.ranking_loss(z, labels, kind="softmax", weights=weights, reduction="sum")
        return torch.nn.functional.normalize(torch.autograd.grad(loss, z)[0])

    wanted = gradient(chances)
    torch.testing.assert_close(gradient(expected, 1 / log.propensity), wanted)
    assert (gradient(expected) - wanted).norm(dim=1).min() > 0.2


def test_the_pages_example():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/clicks.md").read_text(), re.DOTALL)
    names = {}
    exec(example, names)
    assert names["logits"].grad.abs().sum() > 0


def test_the_pages_table_is_that_of_the_run(clicks):
    if not clicks.RESULT.is_file():
        pytest.skip("a source distribution comes without the results")
    page = clicks.PAGE.read_text()
    table = page[page.index(clicks.BEGIN) + len(clicks.BEGIN) : page.index(clicks.END)]
    assert table == clicks.table(json.loads(clicks.RESULT.read_text()))
