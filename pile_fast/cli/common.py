"""What several commands share: argument types, checks before any work, and files that are whole or not there."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

from pile_fast.cli.errors import UserError


def whole_number(least: int) -> Callable[[str], int]:
    """An argparse type."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number >= {least}, got {text!r}")
        return int(text)

    return parse


def real_number(least: float, most: float = math.inf) -> Callable[[str], float]:
    """An argparse type."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (least <= number <= most and math.isfinite(number)):
            wanted = f">= {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"expected a number {wanted}, got {text!r}")
        return number

    return parse


def named(what: str) -> Callable[[str], tuple[str, str]]:
    """An argparse type: NAME=`what` as (name, what)."""

    def parse(text: str) -> tuple[str, str]:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise argparse.ArgumentTypeError(f"expected NAME={what}, got {text!r}")
        return name, value

    return parse


def require(command: str, *modules: str, extra: str = "train") -> None:
    """Ends the command with the line that installs what is missing."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"{command} needs {error.name}: pip install 'pile_fast[{extra}]'") from error


def writable_folder(path: str | Path) -> Path:
    """The folder of --output, there and fit to be written to."""
    output = Path(path)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(f"--output {output}: cannot write there: {error.strerror}") from error
    return output


def load_ranker(model: str, **options):
    """`pile_fast.students.load_ranker` without its library's progress bars and notices."""
    import transformers

    from pile_fast import students

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return students.load_ranker(model, **options)


def as_json(value: object) -> str:
    """JSON text; a number that is not finite, for which JSON has no word, is null."""
    return json.dumps(_finite(value), indent=1, allow_nan=False) + "\n"


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
