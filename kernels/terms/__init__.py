"""The terms of the student's loss: a file each, named by the term's key, such as `distill_logistic`.

A file has the functions

- `enter(k, lists, how) -> state`: a tuple of what a chunk's rows share, None where there is nothing;
- `rows(k, lists, rows, state, pulls, losses, numbers, how) -> (loss, slope, weight)` of the rows, in float32 or wider: a
  query's loss is Σ loss / Σ weight, and the slope the derivative of Σ loss by a logit (of a distillation: by z / τ). A query
  counts if Σ weight > 0, which a term of whole lists makes so by dividing by what it is normalised by, Σ gain for instance.
  Documents' weights c (`loss.load_c`) multiply losses and slopes, not weights;

and, if it wants them,

- `sums(k, z, s, c, gain, numbers) -> (first, second, third)`: three numbers of each row, summed over the query for
  `loss.list_sum`. z and s are z / τ and s / τ of a distillation, NaN = no target, and for a label term z and the label's rank,
  NaN = no label. `gain` is there if the term has gains, c 1 where documents have no weights;
- `gain(numbers) -> kind`: a label term's labels are gains, of this kind (`loss.gains_of_labels`). Then field GAIN holds them,
  NaN = no label, whatever the pair weight, and the query's TOP, LABEL_LOW and LABEL_HIGH are there;
- `survey(k, lists, rows, numbers, how)`: a first pass, before that of `rows`, which may store to a label term's own fields,
  OWN and the next, what others are to know of a document;
- `FROM_TOP = True`: of a distillation, z / τ and s / τ are taken from the highest logit with a target, not from the lowest;
- `fields(lists) -> (pulls, losses)`: on the host, what `rows` needs for sums in linear time (backends/triton_long.py). A term
  without has direct sums, or none, and `how.DIRECT` says so.

`numbers` are the term's, in the order of its fields. kernels/loss.py calls the functions, for lists of one program
(`how.ALONE`, `lists` is None) and for chunks of longer ones.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any, NamedTuple


class Functions(NamedTuple):
    """A term's functions, to compile a kernel for."""

    key: str
    enter: Any
    rows: Any
    sums: Any
    gain: Any
    survey: Any
    from_top: bool

    @property
    def cache_key(self) -> str:
        """What Triton keeps compiled kernels by: the functions' sources, as it does for a function."""
        of_functions = (f.cache_key for f in (self.enter, self.rows, self.sums, self.gain, self.survey) if f is not None)
        return f"{self.key}{self.from_top}" + "".join(of_functions)


class _Files:
    """The terms' keys: those that have a file."""

    def __contains__(self, key: object) -> bool:
        return importlib.util.find_spec(f"{__name__}.{key}") is not None


FILES = _Files()


def module(key: str) -> ModuleType:
    """A term's file."""
    return importlib.import_module(f"{__name__}.{key}")


@functools.cache
def functions(key: str) -> Functions:
    """A term's functions for kernels."""
    file = module(key)
    optional = (getattr(file, name, None) for name in ("sums", "gain", "survey"))
    return Functions(key, file.enter, file.rows, *optional, getattr(file, "FROM_TOP", False))
