"""The loss inside other libraries' training loops: one module per library, imported by name.

Importing this package imports none of the libraries. A module whose library is missing raises an ImportError that says what to
install.
"""

import importlib
from types import ModuleType

from pile_fast.extras import needs_extra


def import_library(module: str, extra: str) -> ModuleType:
    """Import an optional library's module; an ImportError says which extra of this package brings it."""
    with needs_extra(extra):
        return importlib.import_module(module)
