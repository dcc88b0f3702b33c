"""The terms of the student's loss: a file each, named by the term's key, such as `distill_logistic`.

A file has the functions

- `enter(k, lists, how) -> state`: a tuple of what a chunk's rows share, None where there is nothing;
- `rows(k, lists, rows, state, pulls, losses, numbers, how) -> (loss, slope, weight)` of the rows, in float32 or wider: a
  query's loss is Σ loss / Σ weight, and the slope the derivative of Σ loss by a logit (of a distillation: by z / τ);

and, if it wants them,

- `sums(k, z, s, numbers) -> (first, second)`: two numbers of each row, summed over the query for `loss.list_sum`. z and s are
  z / τ and s / τ of a distillation, NaN = no target, and for a label term z and the label's rank, NaN = no label;
- `fields(lists) -> (pulls, losses)`: on the host, what `rows` needs for sums in linear time (backends/triton_long.py).

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

    @property
    def cache_key(self) -> str:
        """What Triton keeps compiled kernels by: the functions' sources, as it does for a function."""
        return self.key + "".join(f.cache_key for f in self[1:] if f is not None)


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
    return Functions(key, file.enter, file.rows, getattr(file, "sums", None))
