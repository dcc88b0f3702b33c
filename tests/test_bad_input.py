"""Wrong arguments: a clear error that names the argument, before any kernel runs, from every public function."""

import pytest
import torch

import pile_fast
from pile_fast import backends
from pile_fast.backends import cpp, select
from pile_fast.batch import RankingBatch

Z, T, Y = torch.randn(2, 5), torch.randn(2, 5, 3), torch.zeros(2, 5)
FLAT = Z[0], T[0], Y[0]
MASK = torch.ones(2, 5, dtype=torch.bool)


def cu(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    "arguments, options, error, words",
    [
        # tensors
        ((None, T, Y), {}, TypeError, "student_logits: expected a torch.Tensor, got None"),
        ((Z, None, Y), {}, TypeError, "teacher_logits: expected a torch.Tensor, got None"),
        ((Z, T, None), {}, TypeError, "labels: expected a torch.Tensor, got None"),
        ((Z.tolist(), T, Y), {}, TypeError, "student_logits: expected a torch.Tensor, got list"),
        ((Z.long(), T, Y), {}, TypeError, "student_logits: expected a floating dtype .*, got torch.int64"),
        ((Z, T.int(), Y), {}, TypeError, "teacher_logits: expected a floating dtype .*, got torch.int32"),
        ((Z, T, Y.to(torch.complex64)), {}, TypeError, "labels: expected a real dtype, got torch.complex64"),
        ((Z[0], T, Y), {}, ValueError, r"student_logits: expected \(Q, N\) \(padded; pass cu_seqlens .*\), got \(5,\)"),
        ((Z, T[0], Y), {}, ValueError, r"teacher_logits: expected \(Q, N, M\) .*, got \(5, 3\)"),
        ((Z, T[:, :4], Y), {}, ValueError, r"teacher_logits: expected \(Q, N, M\) = \(2, 5, M\) .*, got \(2, 4, 3\)"),
        ((Z, T[..., :0], Y), {}, ValueError, "teacher_logits: expected at least one teacher"),
        ((Z, T, Y[:1]), {}, ValueError, r"labels: expected \(Q, N\) = \(2, 5\) like student_logits, got \(1, 5\)"),
        ((Z, T.clone().requires_grad_(), Y), {}, ValueError, r"teacher_logits: requires grad.*detach"),
        ((Z, T, Y.clone().requires_grad_()), {}, ValueError, r"labels: requires grad.*detach"),
        ((Z, T.to("meta"), Y), {}, ValueError, "teacher_logits: expected device cpu like student_logits, got meta"),
        ((Z, T, Y.to("meta")), {}, ValueError, "labels: expected device cpu"),
        # mask
        ((Z, T, Y), {"mask": MASK.float()}, TypeError, "mask: expected torch.bool, got torch.float32"),
        ((Z, T, Y), {"mask": [True]}, TypeError, "mask: expected a torch.Tensor, got list"),
        ((Z, T, Y), {"mask": MASK[:, :4]}, ValueError, r"mask: expected \(Q, N\) = \(2, 5\)"),
        # cu_seqlens
        (FLAT, {"cu_seqlens": cu(0, 5), "mask": MASK[0]}, ValueError, "mask: only the padded layout"),
        (FLAT, {"cu_seqlens": cu(0, 5, dtype=torch.int16)}, TypeError, "cu_seqlens: expected torch.int32 or torch.int64"),
        (FLAT, {"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens: expected a torch.Tensor, got list"),
        (FLAT, {"cu_seqlens": cu(0, 5).view(1, 2)}, ValueError, r"cu_seqlens: expected \(Q \+ 1,\), got \(1, 2\)"),
        (FLAT, {"cu_seqlens": cu()}, ValueError, r"cu_seqlens: expected \(Q \+ 1,\), got \(0,\)"),
        (FLAT, {"cu_seqlens": cu(1, 5)}, ValueError, "cu_seqlens: expected the first entry to be 0, got 1"),
        (
            FLAT,
            {"cu_seqlens": cu(0, 3, 2, 5)},
            ValueError,
            "cu_seqlens: expected non-decreasing entries, got 3 then 2 at query 1",
        ),
        (FLAT, {"cu_seqlens": cu(0, -1)}, ValueError, "cu_seqlens: expected non-decreasing"),
        (FLAT, {"cu_seqlens": cu(0, 6)}, ValueError, "cu_seqlens: expected the last entry to be at most D = 5, got 6"),
        ((Z, T, Y), {"cu_seqlens": cu(0, 5)}, ValueError, r"student_logits: expected \(D,\) \(packed: cu_seqlens is given\)"),
        # prior
        (
            (Z, T, Y),
            {"prior": torch.ones(2)},
            ValueError,
            r"prior: expected \(M,\) = \(3,\) or \(Q, M\) = \(2, 3\), got \(2,\)",
        ),
        ((Z, T, Y), {"prior": torch.ones(3).long()}, TypeError, "prior: expected a floating dtype"),
        ((Z, T, Y), {"prior": -torch.ones(3)}, ValueError, "prior: expected finite weights >= 0"),
        ((Z, T, Y), {"prior": torch.full((3,), torch.nan)}, ValueError, "prior: expected finite weights >= 0"),
        ((Z, T, Y), {"prior": torch.tensor([1.0, torch.inf, 1.0])}, ValueError, "prior: expected finite weights >= 0"),
        ((Z, T, Y), {"prior": torch.zeros(3)}, ValueError, "prior: expected a weight > 0 for some teacher"),
        (
            (Z, T, Y),
            {"prior": torch.ones(2, 3)},
            ValueError,
            "prior: .* for weights that all queries share",
        ),
        ((Z, T, Y), {"shrinkage": -1.0}, ValueError, "shrinkage: expected a number >= 0"),
        ((Z, T + 9, Y), {"normalize": "logit"}, ValueError, r"teacher_logits: expected probabilities in \[0, 1\]"),
        # options
        ((Z, T, Y), {"iterations": -1}, ValueError, "iterations: expected an int >= 0, got -1"),
        ((Z, T, Y), {"iterations": 2.0}, TypeError, "iterations: expected an int, got float"),
        ((Z, T, Y), {"step_size": -1.0}, ValueError, "step_size: expected a number >= 0"),
        ((Z, T, Y), {"step_size": [1]}, TypeError, "step_size: expected a number, got list"),
        ((Z, T, Y), {"temperature": 0.0}, ValueError, "temperature: expected a number > 0"),
        ((Z, T, Y), {"temperature": torch.tensor(1.0)}, TypeError, "temperature: expected a number, got Tensor"),
        ((Z, T, Y), {"margin": float("nan")}, ValueError, "margin: expected a number finite"),
        (
            (Z, T, Y),
            {"granularity": "pair"},
            ValueError,
            "granularity: expected .*'query', got 'pair'",
        ),
        ((Z, T, Y), {"normalize": "max"}, ValueError, "normalize: expected one of"),
        ((Z, T, Y), {"pair_weight": "ndcg"}, ValueError, "pair_weight: expected one of None, 'label_gap', 'gain_gap'"),
        ((Z, T, Y), {"pairwise": "fft"}, ValueError, "pairwise: expected one of"),
        ((Z, T, Y), {"alpha": 1.5}, ValueError, "alpha: expected a number >= 0 and <= 1, got 1.5"),
        ((Z, T, Y), {"alpha": True}, TypeError, "alpha: expected a number, got bool"),
        ((Z, T, Y), {"distillation": "ce"}, ValueError, "distillation: expected one of"),
        ((Z, T, Y), {"distillation": "logistic:temperature=-1"}, ValueError, "Logistic: temperature: expected a number > 0"),
        ((Z, T, Y), {"reduction": "average"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'average'"),
        ((Z, T, Y), {"backend": "rocm"}, ValueError, "backend: expected one of 'auto'"),
    ],
)
@pytest.mark.parametrize("backend", ["torch"] if cpp.unavailable() else ["torch", "cpp"])
def test_pile_loss(arguments, options, error, words, backend):
    with pytest.raises(error, match=words):
        pile_fast.pile_loss(*arguments, **({"backend": backend} | options))


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: pile_fast.pile_ensemble(None, Y), TypeError, "teacher_logits: expected a torch.Tensor, got None"),
        (lambda: pile_fast.pile_ensemble(T, None), TypeError, "labels: expected a torch.Tensor, got None"),
        (lambda: pile_fast.pile_ensemble(T, Y[:, :2]), ValueError, "labels: expected .* like teacher_logits"),
        (lambda: pile_fast.distillation_loss(Z, None), TypeError, "target_logits: expected a torch.Tensor, got None"),
        (lambda: pile_fast.distillation_loss(Z, Z[:1]), ValueError, r"target_logits: expected \(Q, N\) = \(2, 5\)"),
        (
            lambda: pile_fast.distillation_loss(Z, Z.clone().requires_grad_()),
            ValueError,
            "target_logits: requires grad",
        ),
        (lambda: pile_fast.distillation_loss(Z, Z, kind="l1"), ValueError, "kind: expected one of"),
        (lambda: pile_fast.ranking_loss(Z, None), TypeError, "labels: expected a torch.Tensor, got None"),
        (lambda: pile_fast.PILELoss(alpha=-1), ValueError, "alpha: expected a number >= 0"),
        (lambda: pile_fast.PILELoss(granularity="x"), ValueError, "granularity: expected one of"),
        (lambda: pile_fast.PILELoss()(T, Z, Y), ValueError, "student_logits: expected"),  # the arguments' order
        (lambda: RankingBatch(labels=Y), TypeError, "student_logits: expected a torch.Tensor, got None"),
    ],
)
def test_the_other_functions(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_backend_asked_for_by_name_never_falls_back():
    if cpp.unavailable():
        pytest.skip(cpp.unavailable())
    with pytest.raises(RuntimeError, match="backend 'cpp' serves cpu tensors, got meta; use backend='auto'"):
        select("cpp", RankingBatch(student_logits=torch.empty(1, 1, device="meta")), None, None)
    assert select("auto", RankingBatch(student_logits=torch.empty(1, 1, device="meta")), None, None) == "torch"


def test_auto_passes_over_a_backend_that_refuses_the_batch(monkeypatch):
    first, second = backends._ORDER["cpu"]
    monkeypatch.setattr(backends.load(first), "unavailable", lambda: "")
    is_wide = lambda batch, ensemble, loss: "has its reasons" if batch.dtype is torch.float64 else ""  # noqa: E731
    monkeypatch.setattr(backends.load(first), "refusal", is_wide)
    none = (None, None)
    wide, narrow = RankingBatch(student_logits=Z.double()), RankingBatch(student_logits=Z)
    assert select("auto", wide, *none) == second and select("auto", narrow, *none) == first == select(first, narrow, *none)
    with pytest.raises(RuntimeError, match=f"backend '{first}' has its reasons"):
        select(first, wide, *none)


@pytest.mark.skipif(bool(cpp.unavailable()), reason=cpp.unavailable() or "built")
def test_the_raw_op_refuses_what_would_read_nothing():
    from pile_fast import autograd
    from pile_fast.options import loss_options

    options = autograd.flat(loss_options(alpha=0.5))
    with pytest.raises(ValueError, match="target_logits: needed"):
        torch.ops.pile_fast.pair_loss(Z, None, Y, None, None, None, None, *options, True, "cpp")
    with pytest.raises(ValueError, match="labels: needed"):
        torch.ops.pile_fast.pair_loss(Z, Z, None, None, None, None, None, *options, True, "cpp")
