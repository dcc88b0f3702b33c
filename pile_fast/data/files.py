"""Files: lines of text whatever the compression, and outputs that are either complete or not there."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import lzma
import os
import secrets
import stat
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from pile_fast.data.rows import BadRows, DataError, reject

T = TypeVar("T")
_OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}
# System errors that only writing can meet: no space, no quota, too large, read-only.
_ONLY_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_BLOCK, _BLOCKS = 2**20, 64  # of a file's fingerprint
DAMAGED = (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError)


def open_bytes(path: Path) -> IO[bytes]:
    """A plain, .gz or .xz file, to read."""
    return _OPENERS.get(path.suffix, open)(path, "rb")


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """A plain, .gz or .xz file, to write UTF-8 lines to; the same lines give the same bytes."""
    with contextlib.ExitStack() as files:
        file: IO[bytes] = files.enter_context(open(path, "wb"))
        if path.suffix == ".gz":  # without name and time
            file = cast(IO[bytes], files.enter_context(gzip.GzipFile("", "wb", fileobj=file, mtime=0)))
        elif path.suffix == ".xz":
            file = cast(IO[bytes], files.enter_context(lzma.open(file, "wb")))
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

    A reader of `path` sees the old file or the complete new one, also after a crash of the machine. Any number of threads,
    processes and machines may write to one `path`: the last one's file is there in the end. An old file's mode is kept.

    Args:
        path: the file to be; may be there already.
        folder: where the temporary file lies, on the same file system; None = beside `path`.

    Raises:
        OSError: not a regular file, or it cannot be written there; the error names `path`, not the temporary file.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "answer.txt"
    >>> with atomic_path(target) as temporary:
    ...     _ = temporary.write_text("42")
    >>> target.read_text()
    '42'
    """
    given, path = os.fspath(path), Path(os.path.realpath(path))  # a link keeps pointing at the file
    with _named(given):
        if path.exists() and not path.is_file():
            raise OSError(f"{given}: not a regular file")
        mode = stat.S_IMODE(path.stat().st_mode) & 0o777 if path.exists() else None
        temporary = create_aside(folder or path.parent, path.name, 0o666 if mode is None else 0o600)
    try:
        with _named(given, temporary):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            if mode is not None:
                os.chmod(temporary, mode)
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong first is what matters
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def create_aside(folder: Path, name: str, mode: int) -> Path:
    """A new empty file in a folder, under a random name, so that no link can have been planted there.

    Its suffix is that of `name`: writers choose compression by it.
    """
    stem, suffix = os.path.splitext(name)
    while True:
        path = folder / f".{stem[:40]}.{secrets.token_hex(8)}{suffix}"
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), mode))
            return path
        except FileExistsError:
            continue


@contextlib.contextmanager
def _named(path: str, temporary: Path | None = None) -> Iterator[None]:
    """Name `path` in errors of writing, not a temporary file that the user does not know."""
    try:
        yield
    except OSError as error:
        if temporary is None and error.errno is not None:
            raise OSError(error.errno, f"cannot write there: {os.strerror(error.errno)}", path) from None
        ours = temporary is not None and (str(error.filename) == str(temporary) or str(temporary) in str(error))
        if error.errno is not None and (ours or (error.filename is None and error.errno in _ONLY_WRITING)):
            raise OSError(error.errno, os.strerror(error.errno), path) from error
        raise


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a crash of the machine."""
    with contextlib.suppress(OSError):  # some systems cannot open folders; the rename is atomic all the same
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def refuse_same_file(output: Path, inputs: Sequence[str | os.PathLike]) -> None:
    """Raises ValueError if the output is one of the files that are read."""
    if output.exists() and any(os.path.samefile(path, output) for path in inputs):
        raise ValueError(f"{output}: the output would replace the input")


def fingerprint(*paths: str | os.PathLike) -> list[list]:
    """[absolute path, bytes, time of change, digest] of each file: what must be unchanged for a job to resume.

    The digest is of the whole content up to 64 MiB, else of 64 blocks of 1 MiB from the first to the last.
    """
    return [_fingerprint(os.path.abspath(path)) for path in paths]


def _fingerprint(path: str) -> list:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        last = status.st_size - _BLOCK
        starts = range(0, status.st_size, _BLOCK)
        for start in starts if len(starts) <= _BLOCKS else (last * i // (_BLOCKS - 1) for i in range(_BLOCKS)):
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return [path, status.st_size, status.st_mtime_ns, digest.hexdigest()]


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, the next one made in a thread while the caller works on this one."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield cast(T, item)
