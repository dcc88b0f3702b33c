"""The CUDA kernels on the CPU (tests/cuda_emulation): the tests of gpu_contract_cases.py, and what only an emulation can ask.

test_cuda.py builds the emulated module and runs this file in a process of its own, with PILE_FAST_CUDA_EMULATION set.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

import pile_fast
from pile_fast.backends import cuda as backend


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu = _load("gpu_contract_cases")
battery, contract = gpu.battery, gpu.contract
globals().update({k: v for k, v in vars(gpu).items() if k.startswith("test_") or k in gpu.FIXTURES})

module = backend._module()
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=["direct", "chebyshev"])
def how(request):
    return dict(backend="cuda", pairwise=request.param)


@pytest.fixture(autouse=True)
def forward_order():
    yield
    module.set_order("forward")


def test_sharp_steps_stay_in_range(how, granularity):
    _, t, y = battery.batch(2, 40)
    out = battery.ensemble(t, y, how, granularity, normalize="none", iterations=20, step_size=10.0).logits
    assert (out >= t.amin(-1)).all() and (out <= t.amax(-1)).all()


# -- the numerics contract

ENSEMBLES = [
    # n, M, queries, options. A warp per query up to 32 documents, a block beyond; 130: more than one document per four lanes.
    (1, 1, 1, {}),
    (2, 3, 3, dict(pair_weight="label_gap", margin=0.3)),
    (7, 4, 1, dict(normalize="center", temperature=0.5)),
    (17, 1, 3, dict(normalize="none", margin=-0.2)),
    (31, 8, 2, dict(pair_weight="gain_gap", temperature=2.0)),
    (33, 5, 2, dict(normalize="none", margin=0.3, pair_weight="label_gap")),
    (64, 3, 2, dict(iterations=10)),
    (130, 9, 2, {}),
    (300, 4, 1, dict(pair_weight="gain_gap", iterations=2)),
]


@pytest.fixture(params=ENSEMBLES, ids=str)
def ensemble_case(request):
    return request.param


@pytest.fixture
def ensemble_data():
    return [*gpu.DATA, dict(spread=30.0, missing=0.2)]  # the last is left out of the interpreter to spare time


@pytest.fixture(params=[(n, 25) for n in (1, 2, 7, 33, 130)], ids=str)
def loss_case(request):
    return request.param


@pytest.fixture
def long_list():
    return 1100


def test_half_precision_subnormals(how):
    z, t, y, _ = contract.make(20, 1, 8)
    t = (t * 3e-6).half()
    got = pile_fast.pile_ensemble(t, y, **how).logits
    contract.close(got, got, pile_fast.pile_ensemble(t.double(), y, backend="torch").logits, 1e-5)


def test_labels_of_either_sign_and_zero(how):
    _, t, _ = battery.batch(1, 6)
    y = torch.tensor([[-1.5, 0.0, -0.0, 2.0, -3.0, 1e30]])
    got = pile_fast.pile_ensemble(t, y, pair_weight="label_gap", **how).logits
    want = pile_fast.pile_ensemble(t.double(), y, pair_weight="label_gap", backend="torch").logits
    torch.testing.assert_close(got.double(), want, rtol=0, atol=4e-6)


@pytest.mark.parametrize("teachers", [2, 4, 8, 16, 129])
def test_teachers_by_vector_loads_and_one_by_one(how, teachers):
    for dtype in (torch.float32, torch.bfloat16):
        _, t, y, _ = contract.make(9, 2, teachers, dtype=dtype)
        shifted = torch.empty(t.numel() + 1, dtype=dtype)[1:].view(t.shape).copy_(t)  # not on 16 bytes
        a, b = (pile_fast.pile_ensemble(x, y, iterations=1, **how).logits for x in (t, shifted))
        want = pile_fast.pile_ensemble(t.double(), y, iterations=1, backend="torch").logits
        assert torch.equal(a, b)
        contract.close(a, a, want, 2e-6 * contract.scale_of(t))


# -- what holds to the last bit


def everything(z, t, y, **how):
    """Every output of every op."""
    outputs = []
    for granularity in ("document", "query"):
        outputs += pile_fast.pile_ensemble(
            t, y, granularity=granularity, return_weights=True, return_trace=True, iterations=2, **how
        )
    for options in (dict(alpha=0.5), dict(alpha=0.5, reduction="none", pair_weight="label_gap", granularity="query")):
        outputs += contract.loss_and_gradient(z, t, y, None, iterations=2, **options, **how)
    return [x.nan_to_num(-7.0) for x in outputs]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("n", [13, 40, 150])
def test_the_order_threads_run_in_changes_nothing(how, n):
    z, t, y, _ = contract.make(n, 3, 4, missing=0.2, unlabelled=0.1)
    first = everything(z, t, y, **how)
    for order in ("backward", "random", "random", "forward"):
        assert module.set_order(order)
        assert equal(everything(z, t, y, **how), first), order


def test_a_query_gives_the_same_bits_in_any_batch(how):
    # One query: a row per four lanes, a block. Many: blocks of four rows, a warp each.
    z, t, y, _ = contract.make(40, 70, 4, missing=0.1)
    options = dict(iterations=3, **how)
    many = pile_fast.pile_ensemble(t, y, **options).logits
    assert torch.equal(many[:1], pile_fast.pile_ensemble(t[:1], y[:1], **options).logits)
    assert torch.equal(many[69:], pile_fast.pile_ensemble(t[69:], y[69:], **options).logits)
    losses, gradient = contract.loss_and_gradient(z, t, y, None, reduction="none", **options)
    own, own_gradient = contract.loss_and_gradient(z[:1], t[:1], y[:1], None, reduction="none", **options)
    assert torch.equal(losses[:1], own) and torch.equal(gradient[:1], own_gradient * 1)


# -- shapes and layouts of its own


def test_a_list_longer_than_shared_memory_among_short_ones(how):
    cu_seqlens = torch.tensor([0, 3, 10, 250, 255, 260, 270, 271, 271])
    z, t, y, _ = contract.make(275, 1, 3, missing=0.1)
    z, t, y = z[0], t[0], y[0]
    options = dict(cu_seqlens=cu_seqlens, iterations=2)
    want = pile_fast.pile_ensemble(t.double(), y, backend="torch", return_weights=True, **options)
    got = pile_fast.pile_ensemble(t, y, return_weights=True, **how, **options)
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=4e-6, equal_nan=True)
    z.requires_grad_()
    for a, b in zip(
        torch.autograd.grad(pile_fast.pile_loss(z, t, y, alpha=0.5, **how, **options), z),
        torch.autograd.grad(pile_fast.pile_loss(z, t, y, alpha=0.5, backend="torch", **options), z),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("labels", ["grades", "continuous"])
@pytest.mark.parametrize("n", [1025, 2500])  # two pieces, the second of one document; three
def test_lists_of_several_pieces(how, labels, granularity, n):
    contract.test_long_lists(how, labels, granularity, n)


def test_long_packed_lists(how):
    lengths = [1, 0, 1500, 1024, 130, 2049]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    z, t, y, _ = contract.make(sum(lengths) + 5, 1, 3, missing=0.1, unlabelled=0.1)
    z, t, y = z[0], t[0], y[0]
    options = dict(cu_seqlens=cu_seqlens, iterations=2, pair_weight="label_gap", margin=0.2)
    got = pile_fast.pile_ensemble(t, y, **how, **options).logits
    want = pile_fast.pile_ensemble(t.double(), y, backend="cpp", pairwise="direct", **options).logits
    contract.close(got, want, want, 2e-6 * contract.scale_of(t))
    assert got[-5:].isnan().all()
    gradients = []
    for logits, own in ((z, how), (z.double(), dict(backend="cpp", pairwise="direct"))):
        logits.requires_grad_()
        loss = pile_fast.pile_loss(logits, t.to(logits.dtype), y, alpha=0.5, **own, **options)
        gradients += torch.autograd.grad(loss, logits)
    contract.close(gradients[0], gradients[1], gradients[1], 1e-5 * gradients[1].abs().max().item())


def test_which_lists_are_short():
    device = module.device(0)
    plan = lambda *shape, packed=False, direct=False: module.plan_short(*shape[:2], packed, shape[2], direct, device)  # noqa: E731
    assert plan(8, 32, 4).warps and not plan(8, 64, 4).warps
    assert plan(1, 512, 4).capacity > 512 and plan(1, 1025, 4).capacity == 0
    assert plan(1000, 512, 4).capacity == 0 and plan(1000, 512, 4, direct=True).capacity > 512
    assert plan(2, 500, 100).capacity == 0  # 100 teachers do not fit beside 500 documents
    assert plan(10, 1000, 3, packed=True).scratch_words > 0


@pytest.mark.parametrize("cu_seqlens", [[0, 5, 3, 12], [-4, 2, 99], [7, 7]])
def test_offsets_that_lead_nowhere_stay_inside(how, cu_seqlens):
    """On a device nobody reads them beforehand: the numbers may be nonsense, the addresses must not."""
    z, t, y, _ = contract.make(10, 1, 2)
    pile_fast.pile_loss(z[0].requires_grad_(), t[0], y[0], cu_seqlens=torch.tensor(cu_seqlens), **how).backward()
