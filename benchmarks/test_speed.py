"""For comparing a change with what was there before: pytest benchmarks/test_speed.py --benchmark-enable --benchmark-autosave,
then again with --benchmark-compare. The figures of docs/performance.md come from speed.py, which interleaves."""

import pytest
import torch
from _cases import OPS, call, make_data

SHAPES = ((256, 32, 4), (256, 128, 4), (64, 512, 8), (16, 1024, 8))
PROVIDERS = {
    "torch": dict(backend="torch"),
    "direct": dict(backend="cpp", pairwise="direct"),
    "chebyshev": dict(backend="cpp", pairwise="chebyshev"),
    "auto": dict(backend="cpp", pairwise="auto"),
}


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def data(request):
    return make_data(*request.param)


@pytest.mark.benchmark(min_rounds=3, warmup=False)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("op", OPS, ids=lambda op: f"{op.name}-{op.granularity}")
def test_speed(benchmark, data, op, provider):
    torch.set_num_threads(2)
    run = call(op, data, **PROVIDERS[provider])
    benchmark.group = f"{op} {'x'.join(map(str, data.shape))}"
    run()
    benchmark(run)
