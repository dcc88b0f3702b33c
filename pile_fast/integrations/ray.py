"""Ensembles on Ray Data: a function for `map_batches`, and the same over a folder of Parquet files."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import torch

from pile_fast.extras import needs_extra

with needs_extra("ray"):  # before the module below, whose own need names another extra
    import pyarrow as pa
    import ray
    import ray.data

from pile_fast.data.offline import OfflineEnsemble


class RayEnsemble:
    """An ensemble as a function for `ray.data.Dataset.map_batches`, with ``batch_format="pyarrow"``.

    Args:
        method, arguments: see `pile_fast.data.offline.OfflineEnsemble`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    >>> batch = pa.table({"query_id": ["q"], "labels": [[1, 0]], "teacher_logits": [[[3.0, 0.0], [1.0, 2.0]]]})
    >>> RayEnsemble("mean", normalize="none")(batch)["ensemble_logits"].to_pylist()
    [[1.5, 1.5]]
    """

    def __init__(self, method: str | OfflineEnsemble = "pile", **arguments):
        self.ensemble = method if isinstance(method, OfflineEnsemble) else OfflineEnsemble(method, **arguments)

    # Ray takes an object for a function if it has a name.
    __name__ = "RayEnsemble"

    def __call__(self, batch: pa.Table) -> pa.Table:
        torch.set_num_threads(1)  # Ray gives a task a core
        return self.ensemble(batch)


def ensemble_folder(path: str | os.PathLike, output: str | os.PathLike, ensemble: OfflineEnsemble) -> None:
    """Run an ensemble over a Parquet file, or a folder of them, on Ray; connected to a cluster if ``RAY_ADDRESS`` names one.

    Args:
        path: what `ray.data.read_parquet` reads.
        output: a folder of Parquet files, which must not be there yet; it appears once it is whole.
        ensemble: what to add to the rows.

    Raises:
        ValueError: a row is broken, or `output` is there already.
        FileNotFoundError: there is no input.
    """
    path, output = Path(path).absolute(), Path(output).absolute()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if output.exists():
        raise ValueError(f"{output}: it is there already, name a new folder")
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="error")
    unfinished = output.with_name(output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    rows = ray.data.read_parquet(str(path))
    try:
        # Whole blocks: the packed layout has no use for batches of one size.
        rows.map_batches(RayEnsemble(ensemble), batch_format="pyarrow", batch_size=None).write_parquet(str(unfinished))
    except ray.exceptions.RayError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        # All that comes back of a worker's error is its text.
        if broken := re.search(r"^ValueError: (.*)$", str(error), re.MULTILINE):
            raise ValueError(f"{path}: in a block of it: {broken[1]}") from None
        raise
    os.replace(unfinished, output)
