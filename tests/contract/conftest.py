"""The target of this run, and the axes that its tests are multiplied by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from contract import problems
from contract.targets import TARGETS, Target

import pile_fast

SHAPES_OF_NOTHING = {"one document": (3, 1), "no document": (3, 0), "no query": (0, 5), "nothing": (0, 0)}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--target", choices=list(TARGETS), default="cpu", help="what the contract is run on")
    parser.addoption("--part", default="0/1", help="which of how many parts of the tests to run: processes side by side")


def target_of(config: pytest.Config) -> Target:
    return TARGETS[config.getoption("target", "cpu")]  # not registered where pytest is given no path


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(name): only where this property of the target holds")
    config.addinivalue_line("markers", "axes(**values): what a random batch and its call are drawn from")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    target = target_of(metafunc.config)
    names = metafunc.fixturenames
    if "sample" in names:  # a random batch, in each of the ways that the numerics are tested in
        axes = dict(metafunc.definition.get_closest_marker("axes").kwargs)
        axes["dtype"] = [dtype for dtype in axes["dtype"] if dtype is not torch.float64 or target.float64]
        rows = [
            (way, sample) for way in target.numerics for sample in problems.covering(axes | {"n": way.lengths}, way.samples)
        ]
        ids = [
            f"{way.name}-{number}-n={sample['n']}-{sample.get('distillation', '')}" for number, (way, sample) in enumerate(rows)
        ]
        metafunc.parametrize("how, sample", rows, indirect=["how"], ids=ids)
    elif "how" in names:
        metafunc.parametrize("how", target.ways, indirect=True, ids=lambda way: way.name)
    if "loss" in names:
        rows = [loss for loss in problems.losses(min(10, target.iterations)) if target.repeats or not loss.repeats]
        metafunc.parametrize("loss", rows, ids=lambda loss: loss.name)
    if "granularity" in names:
        metafunc.parametrize("granularity", ["shared", "document", "query"])
    if "shape_of_nothing" in names:
        metafunc.parametrize("shape_of_nothing", SHAPES_OF_NOTHING.values(), ids=SHAPES_OF_NOTHING)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    own = [item for item in items if "contract" in item.path.parts]
    target = target_of(config)
    left_out = {item for item in own for mark in item.iter_markers("needs") if not getattr(target, mark.args[0])}
    part, parts = map(int, config.getoption("part", "0/1").split("/"))
    left_out |= {item for number, item in enumerate(own) if number % parts != part}
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Target:
    return target_of(request.config)


@pytest.fixture(autouse=True)
def on_the_device(target: Target, poisoned: None) -> Iterator[None]:
    """New tensors are made where the target wants them, and empty ones hold NaN."""
    if not target.gpu:
        yield
        return
    torch.set_default_device(target.device)
    yield
    torch.set_default_device(None)


@pytest.fixture
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options that ask for a way."""
    request.param.prepare(monkeypatch)
    return request.param.options


@pytest.fixture
def linear(target: Target, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], int]:
    """The options that ask for sums in linear time, and a length that they are for."""
    if target.linear is None:
        pytest.skip("has no sums in linear time")
    target.linear.prepare(monkeypatch)
    return target.linear.options, target.linear.lengths[0]


@pytest.fixture
def ensemble(how: dict[str, Any], target: Target) -> Callable[..., pile_fast.PILEEnsemble]:
    """`pile_ensemble` in this way, with weights, at few iterations where they are dear."""
    options = dict(how, return_weights=True, iterations=min(10, target.iterations))
    return lambda t, y, **own: pile_fast.pile_ensemble(t, y, **options | own)
