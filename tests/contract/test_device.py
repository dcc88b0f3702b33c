"""What the machine adds: long lists, wide tensors, and on a GPU graphs, streams and the order of things."""

import pytest
import torch
from contract.problems import capture, largest, make, run

import pile_fast
from pile_fast import pile_loss


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.needs("gpu")
@pytest.mark.parametrize("n", [100_000, 1_000_000])
def test_very_long_lists(how, n):
    if how["pairwise"] == "direct":
        pytest.skip("takes minutes")
    z, t, y, _ = make(n, 1, 4)
    loss, gradient = run(pile_loss, z, t, y, **how)
    assert loss.isfinite() and gradient.isfinite().all()


def test_addresses_are_64_bits(how, target):
    """More than 2^31 logits in one tensor."""
    queries, documents, teachers = (2**31 // (64 * 8) + 8, 64, 8) if target.gpu else (2, 8, 4)
    need = queries * documents * (2 * teachers + 4 * (teachers + 14))  # float16 teachers, float32 scratch
    if target.gpu and torch.cuda.mem_get_info()[0] < 1.1 * need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of free GPU memory")
    t = torch.zeros(queries, documents, teachers, dtype=torch.float16)
    y = torch.zeros(queries, documents, dtype=torch.uint8)
    _, some, labels, _ = make(documents, 1, teachers)
    t[-1], y[-1] = some[0].half(), labels[0].to(torch.uint8)
    got = pile_fast.pile_ensemble(t, y, iterations=2, **how).logits[-1]
    want = pile_fast.pile_ensemble(t[-1:].double(), y[-1:], iterations=2, backend="torch").logits[0]
    assert largest(got.double() - want) <= 1e-5


# Lists in one launch, or several; padded, or packed.
LISTS = [((60, 8, 4), False), ((700, 2, 4), False), ((1500, 2, 4), False), ((60, 8, 4), True), ((1400, 3, 3), True)]


def lists(shape, packed, seed=0):
    return make(*shape, packed=packed, masked=0.1 if packed else 0.0, seed=seed)


@pytest.mark.parametrize("shape, packed", LISTS)
@pytest.mark.needs("gpu")
def test_a_graph_replays_with_other_inputs(how, shape, packed):
    z, t, y, where = lists(shape, packed)
    step = lambda: run(pile_loss, z, t, y, **where, **how)  # noqa: E731
    replay = capture(step)
    t.copy_(t.flip(0))
    z.mul_(0.5)
    got = replay()
    torch.cuda.synchronize()
    assert equal(got, step())


@pytest.mark.parametrize("shape, packed", LISTS)
@pytest.mark.needs("gpu")
def test_nothing_reads_the_device(how, granularity, shape, packed):
    z, t, y, where = lists(shape, packed)
    z.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for reduction in ("mean", "sum", "none"):
            loss = pile_loss(z, t, y, alpha=0.5, granularity=granularity, reduction=reduction, **where, **how)
            torch.autograd.grad(loss.sum(), z)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape, packed", LISTS)
@pytest.mark.needs("gpu")
def test_the_same_bits_in_two_streams_at_once(how, shape, packed):
    inputs = [lists(shape, packed, seed) for seed in range(2)]
    want = [run(pile_loss, z, t, y, alpha=0.5, **where, **how) for z, t, y, where in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    got = []
    for _ in range(20):
        for (z, t, y, where), stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(run(pile_loss, z, t, y, alpha=0.5, **where, **how))
    torch.cuda.synchronize()
    assert all(equal(one, want[number % 2]) for number, one in enumerate(got))


@pytest.mark.needs("gpu")
def test_tensors_on_a_device_that_is_not_the_current_one(how):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    z, t, y, _ = make(60)
    want, got = run(pile_loss, z, t, y, **how), run(pile_loss, z.to("cuda:1"), t.to("cuda:1"), y.to("cuda:1"), **how)
    assert torch.cuda.current_device() == 0 and equal(want, [x.to(want[0].device) for x in got])
