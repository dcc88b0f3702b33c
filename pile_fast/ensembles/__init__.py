"""The other ensembles of teachers, behind one signature, to compare with `pile_fast.pile_ensemble`.

Most of these methods were published for classification, and most weight losses rather than logits. Each docstring
says what is its paper's and what is our adaptation to a ranked list. In all of them

- teachers are calibrated per query as in PILE (`normalize`), t̃_im below, and the ensemble is s_i = Σ_m w_m t̃_im;
- NaN or ±inf = this teacher did not score this document: at a document the weights are rescaled to the teachers that scored
  it (their plain mean if those have almost no weight); a teacher that scored nothing of a query does not count there;
- `labels`, where a method makes no use of them, may be given and are only checked;
- results carry no gradient;
- an argument that does not fit raises TypeError or ValueError, whose message names it.

A new one is a file here and a row of `ENSEMBLES`.
"""

import inspect
from collections.abc import Callable

from pile_fast.ensembles.ae_kd import ae_kd_ensemble
from pile_fast.ensembles.base import Ensemble
from pile_fast.ensembles.best import best_teacher_ensemble
from pile_fast.ensembles.ca_mkd import ca_mkd_ensemble
from pile_fast.ensembles.ebkd import ebkd_ensemble
from pile_fast.ensembles.govern import govern_ensemble
from pile_fast.ensembles.mean import mean_ensemble
from pile_fast.ensembles.pile import pile_with_weights
from pile_fast.ensembles.rrf import rrf_ensemble
from pile_fast.ensembles.stacking import StackingEnsemble

# By name. `labels` has no default where a method needs them; `student_logits` is there where the target moves with the student.
ENSEMBLES: dict[str, Callable[..., Ensemble]] = {
    "mean": mean_ensemble,
    "best": best_teacher_ensemble,
    "rrf": rrf_ensemble,
    "ca_mkd": ca_mkd_ensemble,
    "ebkd": ebkd_ensemble,
    "ae_kd": ae_kd_ensemble,
    "govern": govern_ensemble,
    "pile": pile_with_weights,
}
_PARAMETERS = {name: inspect.signature(function).parameters for name, function in ENSEMBLES.items()}
NEEDS_LABELS = frozenset(name for name, takes in _PARAMETERS.items() if takes["labels"].default is inspect.Parameter.empty)
NEEDS_STUDENT = frozenset(name for name, takes in _PARAMETERS.items() if "student_logits" in takes)
# Those that run over files before a student is trained. Stacking is a class: it learns its weights first.
OFFLINE: dict[str, Callable] = {name: ENSEMBLES[name] for name in ENSEMBLES if name not in NEEDS_STUDENT}
OFFLINE["stacking"] = StackingEnsemble

__all__ = [
    "ENSEMBLES", "NEEDS_LABELS", "NEEDS_STUDENT", "OFFLINE", "Ensemble", "StackingEnsemble", "ae_kd_ensemble",
    "best_teacher_ensemble", "ca_mkd_ensemble", "ebkd_ensemble", "govern_ensemble", "mean_ensemble", "rrf_ensemble",
]  # fmt: skip
