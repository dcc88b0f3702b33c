"""Imports of optional libraries, which the extras of this package bring (``pip install 'pile_fast[train]'``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

# Which extra of this package brings a module.
EXTRAS = {
    **dict.fromkeys(
        ("accelerate", "bm25s", "datasets", "huggingface_hub", "jinja2", "matplotlib", "pyarrow", "rich", "safetensors",
         "sklearn", "tokenizers", "tqdm", "transformers", "yaml"),
        "train",
    ),
    "ray": "ray",
    "sentence_transformers": "sentence-transformers",
    "lightning_ir": "lightning-ir",
    "lightgbm": "boosting",
    "xgboost": "boosting",
    "triton": "gpu",
    "ir_measures": "ir-measures",
}  # fmt: skip


@contextlib.contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """Imports within it that fail say which extra brings the library.

    Raises:
        ImportError: the import's own, with the line that installs the extra; its `name` is the module that is missing.

    >>> with needs_extra("train"):
    ...     import a_library_that_is_not_there
    Traceback (most recent call last):
    ImportError: No module named 'a_library_that_is_not_there': pip install 'pile_fast[train]'
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'pile_fast[{name}]'", name=error.name, path=error.path) from error
