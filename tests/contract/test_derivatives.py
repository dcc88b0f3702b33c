"""First and second derivatives, as boosted trees ask for them."""

import pytest
import torch
from contract.problems import close, largest, make, terms_of

from pile_fast.backends import load
from pile_fast.batch import RankingBatch
from pile_fast.functional import derivatives
from pile_fast.options import loss_options

TERMS = [*terms_of("distill"), *terms_of("label")]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("term", TERMS, ids=str)
def test_derivatives_are_those_of_the_reference(how, target, term, weighted):
    if not hasattr(load(how["backend"]), "derivatives"):
        pytest.skip("computes no second derivatives")
    which = dict(alpha=1.0, distillation=term) if term.kind == "distill" else dict(alpha=0.0, label_loss=term)
    for n, spread, labels, ties in ((1, 1.0, "grades", False), (7, 0.01, "grades", False), (40, 3.0, "continuous", True),
                                    (333, 1.0, "grades", False), (200, 60.0, "continuous", False)):  # fmt: skip
        z, t, y, where = make(n, 2, 1, spread=spread, labels=labels, missing=0.2, unlabelled=0.2, masked=0.2)
        z = z.round() if ties else z
        weights = dict(weights=torch.rand(z.shape) * 2, query_weights=torch.tensor([0.5, 2.0])) if weighted else {}
        weight_gap = dict(pair_weight="label_gap") if n == 333 else {}
        options = loss_options(pairwise=how["pairwise"], **which, **weight_gap)

        def of(z, t, backend, options=options, y=y, where=where, weights=weights):
            batch = RankingBatch(student_logits=z, target_logits=t[..., 0], labels=y, **where, **weights)
            return derivatives(batch, options, backend)

        want, own, got = of(z.double(), t.double(), "torch"), of(z, t, "torch"), of(z, t, how["backend"])
        assert (got.hessian >= 0).all()
        close(got.loss, own.loss, want.loss, 2e-6 * max(1.0, largest(want.loss)))
        close(got.gradient, own.gradient, want.gradient, 1e-5 * largest(want.gradient) + 1e-37)
        close(got.hessian, own.hessian, want.hessian, 2e-5 * largest(want.hessian) + 1e-30)


def test_packed_lists_and_documents_of_no_query(how):
    if not hasattr(load(how["backend"]), "derivatives"):
        pytest.skip("computes no second derivatives")
    z, y = torch.randn(9), torch.randint(0, 3, (9,))
    batch = RankingBatch(student_logits=z, labels=y, cu_seqlens=torch.tensor([0, 4, 7]))
    found = derivatives(batch, loss_options(alpha=0.0), how["backend"])
    assert found.loss.shape == (2,) and (found.gradient[7:] == 0).all() and (found.hessian[7:] == 0).all()
    wide = derivatives(batch.with_student(z.half()), loss_options(alpha=0.0), how["backend"])
    assert wide.hessian.dtype == torch.float32
