"""The one error that a command ends with."""

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """Something the user can put right: ends the command with this one line and exit code 1."""


@contextlib.contextmanager
def user_errors(output: str) -> Iterator[None]:
    """What goes wrong with files, options or missing libraries, as a `UserError`.

    Args:
        output: what is being written, for errors of the system that do not say which file they are about.
    """
    try:
        yield
    except ImportError as error:
        wanted = f"this command needs {error.name}: pip install 'pile_fast[train]'"
        raise UserError(wanted if error.name else str(error)) from error
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from error  # transformers' messages have several lines
    except OSError as error:
        about = f"{error.filename}: {error.strerror}" if error.filename else f"{output}: {error.strerror or error}"
        raise UserError(about if error.strerror else str(error)) from error
