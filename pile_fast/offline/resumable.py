"""Outputs of long jobs: numbered parts that survive a kill, and one file in the end."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pile_fast.data.files import ahead, atomic_path

if TYPE_CHECKING:
    import pyarrow as pa

try:
    import fcntl
except ImportError:  # Windows: two processes may write to one output there
    fcntl = None  # type: ignore[assignment]

_PART = re.compile(r"\d{8,}\.parquet")
# What `atomic_path` leaves in the folder if the process is killed.
_STALE = re.compile(r"\..*\.[0-9a-f]{16}(\.\w+)?")


# The errors of file systems without locks, such as some that machines share. Parts are complete there too.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class ResumableOutput:
    """A Parquet file written in numbered parts, so that a job can resume after a kill.

    Parts are in the folder ``<path>.parts`` until `finish`; each is written aside and renamed. What part k holds must
    depend on the settings alone: then the file is the same, byte for byte, however often the job was interrupted.

    Args:
        path: the final file; an old one stays in place until `finish`.
        settings: everything that decides what is written, as JSON: options, and `fingerprint` of the inputs.

    Attributes:
        done: numbers of the parts that are there.

    Raises:
        ValueError: the parts there were written with other settings, another process is writing them, or the folder of the
            parts is something else.
        OSError: cannot write there.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "scores.parquet"
    >>> batches = [[{"query_id": "a", "labels": [1.0]}], [{"query_id": "b", "labels": [0.0]}]]
    >>> with ResumableOutput(path, {"model": "m"}) as output:
    ...     for number, rows in enumerate(batches):
    ...         if number not in output.done:
    ...             output.write(number, rows)
    ...     output.finish()
    >>> from pile_fast.data import read_rows
    >>> [row["query_id"] for row in read_rows(path)]
    ['a', 'b']
    """

    def __init__(self, path: str | os.PathLike, settings: dict):
        self.name = os.fspath(path)
        self.path = Path(os.path.realpath(path))  # the parts go where the file will be, if it is a link
        if self.path.exists() and not self.path.is_file():
            raise OSError(f"{path}: not a regular file")
        self.folder = self.path.with_name(self.path.name + ".parts")
        self._lock: int | None = self._take_lock()
        try:
            for file in self.folder.iterdir():  # of a process that was killed while it wrote
                if _STALE.fullmatch(file.name):
                    file.unlink()
            self.done = {int(file.stem) for file in self.folder.glob("*.parquet") if _PART.fullmatch(file.name)}
            self._check_settings(json.loads(json.dumps(settings)))
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> int:
        while True:
            with self._named():
                with contextlib.suppress(FileExistsError):  # readers of the file may read its parts, and nobody else
                    self.folder.mkdir(self.path.stat().st_mode & 0o777 | 0o700 if self.path.exists() else 0o777)
                if self.folder.is_symlink() or not self.folder.is_dir():  # planted or a mistake: do not change it
                    raise ValueError(f"{self.folder}: expected the folder of an unfinished output or nothing; move it away")
                try:
                    lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
                except FileNotFoundError:  # another process finished between the two lines
                    continue
            if fcntl is None:
                return lock
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The lock must be that of the folder there is now, not of one removed in the meantime.
                if os.path.samestat(os.fstat(lock), os.stat(self.folder / "lock")):
                    return lock
            except BlockingIOError:
                os.close(lock)
                raise ValueError(f"{self.name}: another process is writing this file") from None
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    return lock
                os.close(lock)
                raise
            os.close(lock)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Name the final file in system errors, not its parts."""
        try:
            yield
        except OSError as error:
            if error.errno is None:
                raise
            raise OSError(error.errno, f"cannot write there: {os.strerror(error.errno)}", self.name) from error

    def _check_settings(self, settings: dict) -> None:
        file = self.folder / "settings.json"
        if not self.done:
            with self._named(), atomic_path(file) as temporary:
                temporary.write_text(json.dumps(settings, indent=2) + "\n")
            return
        again = "remove the folder to start again, or name another output"
        try:
            old = json.loads(file.read_text())
        except (FileNotFoundError, ValueError):  # no JSON, no text
            raise ValueError(f"{self.folder} is not the folder of an unfinished output, or it is damaged: {again}") from None
        if old != settings:
            names = sorted(name for name in old.keys() | settings.keys() if old.get(name) != settings.get(name))
            raise ValueError(
                f"{self.folder} holds an unfinished output of other settings or another input "
                f"({', '.join(names)} differ): {again}"
            )

    def _part(self, number: int) -> Path:
        return self.folder / f"{number:08d}.parquet"

    def write(self, number: int, part: pa.Table | Iterable[dict]) -> None:
        """Write part `number`, from 0: a `pyarrow.Table`, or rows of the schema."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        from pile_fast.data.parquet import rows_to_table

        table = part if isinstance(part, pa.Table) else rows_to_table(part)
        with self._named(), atomic_path(self._part(number)) as temporary:
            # Read once more and removed: what is quick to encode.
            pq.write_table(table, temporary, compression="lz4", use_dictionary=False, write_statistics=False)
        self.done.add(number)

    def finish(self) -> None:
        """Put the parts together, in their order, and remove the folder. The output is closed.

        Raises:
            ValueError: a part is missing.
        """
        if self.done != set(range(len(self.done))):
            missing = min(set(range(len(self.done))) - self.done)
            raise ValueError(f"{self.name}: part {missing} is missing")
        if not self.done:
            raise ValueError(f"{self.name}: no parts were written")
        with self._named(), atomic_path(self.path, folder=self.folder) as temporary:
            self._join(temporary)
        self.discard()
        self.close()

    def discard(self) -> None:
        """Remove the parts; of use when what they were made from has changed in the meantime."""
        # Parts before what they belong to, should this be interrupted; the lock last: who takes a new one finds no part.
        parts = [self._part(number) for number in sorted(self.done)]
        for file in [*parts, self.folder / "settings.json", self.folder / "lock"]:
            file.unlink(missing_ok=True)
        self.done = set()
        with contextlib.suppress(OSError):  # another process has begun to write there
            self.folder.rmdir()

    def _join(self, temporary: Path) -> None:
        import pyarrow.parquet as pq

        from pile_fast.data.parquet import write_tables

        parts = [self._part(number) for number in range(len(self.done))]
        write_tables(temporary, pq.read_schema(parts[0]), ahead(map(_read_part, parts)))

    def close(self) -> None:
        """Release the lock; the parts, if there are any, stay."""
        if self._lock is None:
            return
        if self.folder.exists() and not any(_PART.fullmatch(file.name) for file in self.folder.iterdir()):
            self.done = set()
            self.discard()
        os.close(self._lock)
        self._lock = None

    def __enter__(self) -> ResumableOutput:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _read_part(path: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: damaged part: {error}; remove it and run the command again to make it anew") from error
