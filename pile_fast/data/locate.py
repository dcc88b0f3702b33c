"""Where the data lies: an explicit folder, the environment, or `data/` in the checkout or the working directory."""

from __future__ import annotations

import os
from pathlib import Path

DATA_VARIABLE = "PILE_FAST_DATA"
_SUFFIXES = (".xz", "", ".gz")


def find_data(dataset: str, explicit: str | os.PathLike | None = None) -> Path | None:
    """The folder that holds the folder `dataset`, or None.

    A folder named by `explicit` or by the environment variable PILE_FAST_DATA is used even if `dataset` is not in it: the
    reader then names the missing file. The `data/` folders count only if they hold `dataset`.

    Raises:
        FileNotFoundError: the named folder does not exist.
    """
    named = explicit or os.environ.get(DATA_VARIABLE)
    if named:
        folder = Path(named)
        if not folder.is_dir():
            source = "" if explicit else f" (from {DATA_VARIABLE})"
            raise FileNotFoundError(f"data folder {folder}{source} does not exist")
        return folder
    checkout = Path(__file__).resolve().parents[2]
    candidates = [checkout / "data"] if (checkout / "pyproject.toml").is_file() else []
    return next((c for c in (*candidates, Path("data")) if (c / dataset).is_dir()), None)


def find_file(folder: Path, name: str) -> Path:
    """`folder / name`, plain or compressed (.xz, .gz).

    Raises:
        FileNotFoundError: none of them exists; the message names the file.
    """
    for suffix in _SUFFIXES:
        path = folder / (name + suffix)
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder / name}: no such file, nor with .xz or .gz")
