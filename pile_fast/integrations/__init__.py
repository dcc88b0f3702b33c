"""The loss inside other libraries' training loops: one module per library, imported by name.

Importing this package imports none of the libraries. A module whose library is missing raises an ImportError that says what to
install.
"""

import importlib
from types import ModuleType


def import_library(module: str, extra: str) -> ModuleType:
    """Import an optional library's module; an ImportError says which extra of this package brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{error}; this integration needs it: pip install 'pile_fast[{extra}]'") from error
