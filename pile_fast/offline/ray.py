"""Ensembles on Ray Data: a function for `map_batches`, and the same over a folder of Parquet files."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pile_fast.extras import needs_extra

with needs_extra("ray"):  # before the modules below, whose own need names another extra
    import pyarrow as pa
    import ray
    import ray.data

from pile_fast.offline.ensemble import MissingScores, OfflineEnsemble, ensemble_tables, first_teachers, prepare
from pile_fast.offline.parts import DataSet


class RayEnsemble:
    """An ensemble as a function for `ray.data.Dataset.map_batches`, with ``batch_format="pyarrow"``.

    Args:
        method, arguments: see `pile_fast.offline.ensemble.OfflineEnsemble`.
        teachers: the names that all rows' teachers must have, in this order; None = those of a batch's first row.

    Raises:
        ValueError, TypeError: an argument does not fit, or PILE's weights that all queries share are neither given nor to be
            learnt from `fit`: a batch alone cannot tell them. The message names it.

    >>> batch = pa.table({"query_id": ["q"], "labels": [[1, 0]], "teacher_logits": [[[3.0, 0.0], [1.0, 2.0]]]})
    >>> RayEnsemble("mean", normalize="none")(batch)["ensemble_logits"].to_pylist()
    [[1.5, 1.5]]
    """

    def __init__(self, method: str | OfflineEnsemble = "pile", *, teachers: Sequence[str] | None = None, **arguments: Any):
        self.ensemble = method if isinstance(method, OfflineEnsemble) else OfflineEnsemble(method, **arguments)
        if self.ensemble.fits_first:
            raise ValueError(
                "fit: weights that all queries share are not a batch's to learn: give fit=read_fit(...), weights=..., or "
                "granularity='document'"
            )
        self.teachers = teachers

    # Ray takes an object for a function if it has a name.
    __name__ = "RayEnsemble"

    def __call__(self, batch: pa.Table) -> pa.Table:
        torch.set_num_threads(1)  # Ray gives a task a core
        return self.ensemble(batch, teachers=self.teachers)


def ensemble_folder(path: str | os.PathLike, output: str | os.PathLike, ensemble: OfflineEnsemble) -> OfflineEnsemble:
    """Run an ensemble over a Parquet file, or a folder of them, on Ray; connected to a cluster if ``RAY_ADDRESS`` names one.

    Weights that all queries share are learnt first, here, by one pass over teachers and labels.

    Args:
        path: a Parquet file, or a folder of them.
        output: a folder of Parquet files, which must not be there yet; it appears once it is whole.
        ensemble: what to add to the rows.

    Returns:
        The ensemble that was run, with what it learnt.

    Warns:
        UserWarning: see `pile_fast.offline.ensemble.ensemble_file`.

    Raises:
        ValueError: a row is broken, see `pile_fast.offline.ensemble.ensemble_file`, or `output` is there already.
        FileNotFoundError: there is no input, or no folder to put the output in.
    """
    path, output = Path(path), Path(output)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    data = DataSet(path, format="parquet" if path.is_dir() else None)
    if data.format != "parquet":
        raise ValueError(f"{path}: Ray reads Parquet; pile-fast convert makes a Parquet file of it")
    if output.exists():
        raise ValueError(f"{output}: it is there already, name a new folder")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"{output}: cannot write there: no such folder as {output.absolute().parent}")
    missing = MissingScores()
    ensemble = prepare(data, ensemble, missing)
    missing.warn(data.name, ensemble)
    teachers = first_teachers(data)
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    with _whole_folder(output.absolute()) as unfinished:
        rows = ray.data.read_parquet(_paths(path.absolute(), data))
        try:
            # Whole blocks: the packed layout has no use for batches of one size.
            rows.map_batches(RayEnsemble(ensemble, teachers=teachers), batch_format="pyarrow", batch_size=None).write_parquet(
                str(unfinished)
            )
        except ray.exceptions.RayError as error:
            # Only the text of a worker's error comes back.
            if broken := re.search(r"^ValueError: (.*)$", str(error), re.MULTILINE):
                for _ in ensemble_tables(data, ensemble):  # which row of which file it is
                    pass
                raise ValueError(f"{path}: in a block of it: {broken[1]}") from None
            raise
    return ensemble


def _paths(path: Path, data: DataSet) -> str | list[str]:
    """What Ray is to read: the path itself if Ray takes the same files for its own, which it would also look for below."""
    if path.is_file() or set(path.rglob("*.parquet")) == {file.absolute() for file in data.files}:
        return str(path)
    return [str(file.absolute()) for file in data.files]


@contextlib.contextmanager
def _whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `path` once it is whole, and goes if anything fails."""
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}.", dir=path.parent))
    try:
        inside = unfinished / "folder"
        inside.mkdir()  # with the usual mode, which a temporary folder does not have
        yield inside
        os.replace(inside, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
