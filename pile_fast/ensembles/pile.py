"""PILE, as one of the ensembles."""

import functools
from typing import Any, cast

from torch import Tensor

from pile_fast.ensembles.base import Ensemble
from pile_fast.functional import pile_ensemble


@functools.wraps(pile_ensemble, assigned=())  # whose options it takes: for `inspect.signature`
def pile_with_weights(teacher_logits: Tensor, labels: Tensor, **options: Any) -> Ensemble:
    """`pile_fast.pile_ensemble` with its weights, as one of `ENSEMBLES`; `options` are its options."""
    out = pile_ensemble(teacher_logits, labels, return_weights=True, **options)
    return Ensemble(out.logits, cast(Tensor, out.weights))
