"""Files: lines of text whatever the compression, and outputs that are either whole or not there."""

from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

from pile_fast.data.rows import BadRows, DataError, reject

T = TypeVar("T")
_OPENERS = {".xz": lzma.open, ".gz": gzip.open}
DAMAGED = (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError)


def open_bytes(path: Path) -> IO[bytes]:
    """A plain, .gz or .xz file, to read."""
    return _OPENERS.get(path.suffix, open)(path, "rb")


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """A plain, .gz or .xz file, to write UTF-8 lines to; the same lines give the same bytes."""
    with contextlib.ExitStack() as files:
        file = files.enter_context(open(path, "wb"))
        if path.suffix == ".gz":  # without name and time
            file = files.enter_context(gzip.GzipFile("", "wb", fileobj=file, mtime=0))
        elif path.suffix == ".xz":
            file = files.enter_context(lzma.open(file, "wb"))
        yield files.enter_context(io.TextIOWrapper(file, encoding="utf-8", newline="\n"))


def byte_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of a file, decompressed by its suffix.

    Raises:
        DataError: a damaged file.
    """
    number = 0
    try:
        with open_bytes(path) as file:
            for number, line in enumerate(file, 1):
                yield number, line
    except DAMAGED as error:
        raise DataError(path, f"damaged file after line {number}: {error}") from error


def decode(line: bytes) -> str:
    """A line as text, without the byte order mark that some programs begin a file with, wherever files were joined.

    Raises:
        ValueError: not UTF-8.
    """
    try:
        return line.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start + 1}") from None


def read_lines(path: Path, bad_rows: BadRows | None = None) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of a text file, decompressed by its suffix.

    Raises:
        DataError: a damaged file, or a line that is not UTF-8 (which `bad_rows` counts instead).
    """
    for number, line in byte_lines(path):
        try:
            text = decode(line)
        except ValueError as error:
            reject(bad_rows, f"{path}:{number}", error)
            continue
        yield number, text


def fields(line: str) -> list[str]:
    """The fields of a line between ASCII blanks, as programs in C see them: a no-break space is part of a name."""
    return [field.decode() for field in line.encode().split()]


def read_cells(path: Path, separator: str | None, count: int) -> list[list[str]]:
    """The cells of every line, `count` of them; None separates at blanks. A broken line raises `DataError`."""
    lines = []
    for number, line in read_lines(path):
        cells = line.rstrip("\r\n").split(separator)
        if len(cells) != count:
            raise DataError(f"{path}:{number}", f"expected {count} cells, got {len(cells)}")
        lines.append(cells)
    return lines


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, *, folder: Path | None = None) -> Iterator[Path]:
    """A temporary path to write to; on success it replaces `path` in one step, on failure it is removed.

    Whoever reads `path` sees the old file or the whole new one, also after a crash of the machine.

    Args:
        path: the file to be; may be there already.
        folder: where the temporary file lies, on the same file system; None = beside `path`.

    Raises:
        OSError: not a regular file, or it cannot be written there.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "answer.txt"
    >>> with atomic_path(target) as temporary:
    ...     _ = temporary.write_text("42")
    >>> target.read_text()
    '42'
    """
    path = Path(os.path.realpath(path))  # a link keeps pointing at the file
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: not a regular file")
    # The suffix stays the last: writers choose compression by it.
    temporary = (folder or path.parent) / f".{os.getpid()}.{path.name}"
    try:
        try:
            open(temporary, "wb").close()
        except OSError as error:  # about a name that the user has never heard of
            raise OSError(error.errno, f"cannot write there: {error.strerror}", str(path)) from None
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a crash of the machine."""
    with contextlib.suppress(OSError):  # some systems cannot open folders; the rename is atomic all the same
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def fingerprint(*paths: str | os.PathLike) -> list[list]:
    """[absolute path, bytes, time of change] of each file: what a job that goes on must find unchanged."""
    stats = [(os.path.abspath(path), os.stat(path)) for path in paths]
    return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, the next one made in a thread while the caller works on this one."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield item
