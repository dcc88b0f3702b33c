"""What only the Triton kernels are asked, in Triton's interpreter: the ways they cut lists, and the rules that choose them.

test_triton.py runs this file with tests/contract, in a process of its own with TRITON_INTERPRET=1: the switch is read when
triton is imported.
"""

import pytest
import torch
from contract.problems import check_loss, largest, make, run
from contract.targets import a_launch_per_phase, short_blocks

import pile_fast
from pile_fast.backends import triton as backend
from pile_fast.backends import triton_long

pytestmark = pytest.mark.usefixtures("poisoned")
DIRECT, LINEAR = (dict(backend="triton", pairwise=pairwise) for pairwise in ("direct", "chebyshev"))


def test_packed_lists_long_and_short_in_linear_time(monkeypatch):
    # More than 128 chunks, so their sums have two levels; a long list among short and empty ones; documents of no query.
    monkeypatch.setattr(triton_long, "WINDOW", 4)
    z, t, y, _ = make(150, 1, 2, missing=0.2, unlabelled=0.1)
    cu_seqlens = torch.tensor([0, 3, 3, 131, 132, 147], dtype=torch.int32)
    options = dict(cu_seqlens=cu_seqlens, iterations=1, alpha=0.5, reduction="none")
    check_loss(pile_fast.pile_loss, z[0], t[0], y[0], LINEAR, **options)


def test_well_ordered_lists_keep_their_digits(monkeypatch):
    """Two grades, all pairs right by 12 and more: losses and gradients of e^-12 and less."""
    short_blocks(monkeypatch)
    y = torch.arange(120)[None] % 2
    z = y * 14.0 + torch.rand(1, 120)
    rank = lambda z, t, y, **kw: pile_fast.ranking_loss(z, y, **kw)  # noqa: E731
    got, gradient = run(rank, z, z, y, **LINEAR)
    want, want_gradient = run(rank, z.double(), z, y, backend="torch")
    assert abs(got - want) <= 1e-5 * want
    assert largest(gradient - want_gradient) <= 1e-5 * largest(want_gradient)


@pytest.mark.parametrize("n, queries, packed, linear", [
    (128, 4096, False, False), (512, 1024, False, True), (1000, 16, False, False), (100_000, 1, False, True),
    (4096, 64, True, False), (100_000, 1000, True, True), (8191, 1, True, False),
])  # fmt: skip
def test_auto_goes_by_shapes(n, queries, packed, linear):
    shape = (n,) if packed else (queries, n)
    student = torch.empty(shape, device="meta")
    cu_seqlens = torch.empty(queries + 1, dtype=torch.int32, device="meta") if packed else None
    assert backend._in_linear_time(pile_fast.batch.RankingBatch(student_logits=student, cu_seqlens=cu_seqlens)) == linear


def test_the_same_bits_every_time_in_several_launches(monkeypatch):
    a_launch_per_phase(monkeypatch)
    z, t, y, _ = make(40)
    first, again = (run(pile_fast.pile_loss, z, t, y, alpha=0.5, iterations=2, **DIRECT) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_more_than_128_teachers_are_refused():
    with pytest.raises(RuntimeError, match="backend 'triton' takes at most 128 teachers, got 129"):
        pile_fast.pile_ensemble(torch.zeros(1, 4, 129), torch.zeros(1, 4), backend="triton")
