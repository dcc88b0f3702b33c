"""How a command ends when it cannot go on: the one place that turns exceptions into a line and an exit code.

The line says what is wrong, where, and what to do. An exception that no input explains is a bug of this package: it stays a
traceback. ``PILE_FAST_DEBUG=1`` shows the traceback behind a line.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pickle
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import NoReturn

from pile_fast.data.files import DAMAGED
from pile_fast.extras import EXTRAS
from pile_fast.printable import printable

DONE, FAILED, WRONG_USAGE, INTERRUPTED, READER_LEFT = 0, 1, 2, 130, 141
LONGEST_LINE = 2000


class UserError(Exception):
    """Something the user can put right: ends the command with this one line and exit code 1."""


def report(kind: str, message: object) -> None:
    """Print "pile-fast: `kind`: message" on stderr: one line, nothing in it but what a terminal may show."""
    line = printable(re.sub(r"\s*\n\s*", " ", str(message).strip()))
    line = line if len(line) <= LONGEST_LINE else line[: LONGEST_LINE - 4] + " ..."
    print(f"pile-fast: {kind}: {line}", file=sys.stderr)


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Warnings of Python as lines of the command."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: report("warning", message)
        yield


def explain(error: BaseException, output: str | None = None) -> str | None:
    """What the user reads of an exception; None where no input explains it.

    Args:
        output: what is being written, for errors of the system that do not say which file they are about.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ImportError):
        return _missing(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory; smaller batches or fewer documents to a query need less ({str(error) or 'no details'})"
    if isinstance(error, UnicodeError):
        return f"text that is not Unicode: {error}"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error}"
    if isinstance(error, (*DAMAGED, pickle.UnpicklingError)):
        return f"damaged file: {error}"
    if isinstance(error, OSError):
        return _system(error, output)
    if _of_pyarrow(error) or isinstance(error, ValueError) and _was_said(error):
        return str(error)
    if isinstance(error, TypeError) and re.match(r"[\w.\[\]-]+: expected ", str(error)):  # an argument of this package's
        return str(error)
    return None


def _missing(error: ImportError) -> str:
    module = (error.name or "").partition(".")[0]
    if not module or "pip install" in str(error):
        return str(error)
    if module == "pile_fast":
        return f"this installation of pile_fast is incomplete, install it again: {error}"
    extra = f"'pile_fast[{EXTRAS[module]}]'" if module in EXTRAS else module
    if isinstance(error, ModuleNotFoundError):
        return f"this command needs {module}: pip install {extra}"
    return f"the {module} that is installed does not fit ({error}): pip install --upgrade {extra}"


def _system(error: OSError, output: str | None) -> str:
    if not error.strerror:
        return str(error) or type(error).__name__
    about = error.filename
    if about is None:
        about = "standard output" if _output_fails() else output
    about = os.fsdecode(about) if isinstance(about, (bytes, os.PathLike)) else about
    return error.strerror if about is None else f"{about}: {error.strerror}"


def _of_pyarrow(error: BaseException) -> bool:
    """It raises these about what a file holds."""
    pyarrow = sys.modules.get("pyarrow")
    return pyarrow is not None and isinstance(error, pyarrow.ArrowException)


def _was_said(error: BaseException) -> bool:
    """Whether a `raise` wrote the message: the words of an operation that failed tell the user nothing."""
    trace = traceback.extract_tb(error.__traceback__)
    return not trace or (trace[-1].line or "raise ").startswith("raise ")


def ended(error: BaseException, output: str | None = None) -> int | None:
    """Tell the user what ended a command; the exit code, or None for a fault of this package, which must not be hidden."""
    if isinstance(error, KeyboardInterrupt):
        print("pile-fast: interrupted", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):  # the reader of the output, such as `head`, has closed it
        _no_more_output()
        return READER_LEFT
    line = explain(error, output)
    if line is None:
        return None
    if os.environ.get("PILE_FAST_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    report("error", line)
    return FAILED


def leave(code: int) -> NoReturn:
    """End the process at once: Python takes a second or more to unload PyTorch, and the user is waiting."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(code)


def _output_fails() -> bool:
    """Whether what was printed cannot be written; then nothing more is tried."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # ValueError: it was closed
        _no_more_output()
        return True
    return False


def _no_more_output() -> None:
    """Python flushes what is left at the end, and would complain once more."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def any_characters() -> Iterator[None]:
    """Standard output takes every character: what its encoding lacks is written as an escape."""
    if getattr(sys.stdout, "errors", None) != "strict" or not hasattr(sys.stdout, "reconfigure"):
        yield
        return
    stdout = sys.stdout
    stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, OSError):  # closed, by us or by its reader
            stdout.reconfigure(errors="strict")
