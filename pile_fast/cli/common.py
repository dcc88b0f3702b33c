"""What several commands share: argument types, checks before any work, and files that are complete or not there."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import pickle
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pile_fast.cli.errors import UserError
from pile_fast.data import BadRows, TeacherWeights, atomic_path
from pile_fast.data.formats import FORMATS
from pile_fast.data.missing import MISSING
from pile_fast.extras import EXTRAS
from pile_fast.options import Option, Options, table
from pile_fast.printable import printable

if TYPE_CHECKING:
    from pile_fast.students import Ranker


def whole_number(least: int) -> Callable[[str], int]:
    """An argparse type."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number >= {least}, got {text!r}")
        return int(text)

    return parse


def real_number(least: float, most: float = math.inf) -> Callable[[str], float]:
    """An argparse type."""

    def parse(text: str) -> float:
        try:
            number = float(text) if text.isascii() and "_" not in text else math.nan
        except ValueError:
            number = math.nan
        if not (least <= number <= most and math.isfinite(number)):
            wanted = f" >= {least:g}" if most == math.inf else f" from {least:g} to {most:g}"
            wanted = "" if least == -math.inf else wanted
            raise argparse.ArgumentTypeError(f"expected a number{wanted}, got {text!r}")
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


def add_input(parser: argparse.ArgumentParser) -> None:
    """The arguments of a command that reads one file of queries: `data`, `source` (its format), `skip_bad_rows`."""
    parser.add_argument("data", metavar="DATA", help="a file of queries: .jsonl, .parquet, .txt (LETOR), ...")
    add_format(parser, "DATA")
    add_skip_bad_rows(parser)


def add_format(parser: argparse._ActionsContainer, of: str) -> None:
    """--from, as `source`: the format of what a command reads."""
    formats = ", ".join(FORMATS)
    help = f"of {of}: {formats} (default: by the file's name)"
    parser.add_argument("--from", dest="source", choices=FORMATS, metavar="FORMAT", help=help)


def add_skip_bad_rows(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave broken rows out, and report how many and why")


def add_missing(parser: argparse._ActionsContainer) -> None:
    """--missing: how to read scores that a teacher did not give."""
    parser.add_argument(
        "--missing", choices=MISSING, default="nan", help="a document that a teacher did not score: 'nan' = the teacher says "
        "nothing about it, 'bottom' = it is below the end of the teacher's list, as in runs cut at a depth (default: nan)",
    )  # fmt: skip


def flags_of(*sets: Options) -> dict[str, Option]:
    """The options of the sets that a command line has: all but how pairs are summed and the losses reduced."""
    rows = table(*sets)  # type: ignore[arg-type]
    return {name: row for name, row in rows.items() if name not in ("pairwise", "reduction")}


def add_qrels(parser: argparse.ArgumentParser) -> None:
    """--qrels and --unjudged, of TREC runs."""
    parser.add_argument("--qrels", metavar="FILE", help="TREC: judgements, 'query iteration document grade'")
    help = "TREC: label of what the qrels do not list (default: unlabelled)"
    parser.add_argument("--unjudged", type=real_number(-math.inf), metavar="LABEL", help=help)


def add_models(parser: argparse.ArgumentParser) -> None:
    """How the models of --model and --teacher run."""
    parser.add_argument("--batch-size", type=whole_number(1), default=64, help="texts a model scores at once (default: 64)")
    parser.add_argument("--max-length", type=whole_number(1), help="tokens a text model reads (default: what it allows)")
    parser.add_argument("--device", help="where models run, e.g. cuda:1 or cpu (default: the GPU if there is one)")


def add_options(parser: argparse._ActionsContainer, *sets: Options, defaults: bool = False) -> list[argparse.Action]:
    """A flag for each of `flags_of`, None where it is not given.

    Args:
        defaults: say in the help what None stands for.
    """
    actions = []
    for name, row in flags_of(*sets).items():
        choices, default = [choice for choice in row.choices if choice], row.default if defaults else None
        help = row.help if default is None else f"{row.help} (default: {default})"
        flag = "--" + name.replace("_", "-")
        actions.append(parser.add_argument(flag, type=_checked(name, row), choices=choices or None, help=help))
    return actions


def _checked(name: str, row: Option) -> Callable[[str], Any]:
    """An argparse type: the text as the option's type, if the option's check passes it."""

    def parse(text: str) -> Any:
        value = row.type(text)
        try:
            row.check(name, value)
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"{name}: ")) from None
        return value

    parse.__name__ = getattr(row.type, "__name__", "parse")  # for argparse's "invalid int value"
    return parse


def given(args: argparse.Namespace, names: Iterable[str]) -> dict:
    """The options among `names` that the command line gave."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def print_left_out(bad_rows: BadRows | None) -> None:
    """What --skip-bad-rows left out, on stderr."""
    if bad_rows is not None and bad_rows.count:
        shown = "" if bad_rows.count == len(bad_rows.reasons) else f", the first {len(bad_rows.reasons)}"
        reasons = map(printable, bad_rows.reasons)
        print(f"Left out {bad_rows.count:,} broken rows or lines{shown}:", *reasons, sep="\n  ", file=sys.stderr)


def print_weights(weights: TeacherWeights | None) -> None:
    """How much each teacher counts, if that was learned."""
    if weights is not None:
        learned = f" (from {weights.labelled_queries:,} labelled queries)" if weights.labelled_queries else ""
        print(f"Teachers' weights{learned}: {printable(str(weights))}.")


def progress(rows: Iterable[dict]) -> Iterable[dict]:
    """The rows, counted on a terminal as they are taken."""
    from tqdm import tqdm

    return tqdm(rows, unit=" queries", disable=None)


def require(command: str, *modules: str) -> None:
    """Ends the command with the line that installs what is missing."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"{command} needs {error.name}: pip install 'pile_fast[{EXTRAS.get(module, 'train')}]'") from error


# Folders that this command made, in this order.
_made: list[Path] = []


def writable_folder(path: str | Path, flag: str = "--output") -> Path:
    """The folder of --output, or of another flag: made if needed, and writable. See `made_folders` for its removal."""
    output = Path(path)
    _made.extend(folder for folder in (*reversed(output.parents), output) if not folder.exists())
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(f"{flag} {output}: cannot write there: {error.strerror}") from error
    return output


@contextlib.contextmanager
def made_folders() -> Iterator[None]:
    """If the command fails inside, remove the folders that `writable_folder` made, if they are empty."""
    _made.clear()
    try:
        yield
    except BaseException:
        for folder in reversed(_made):
            with contextlib.suppress(OSError):  # there is something in it
                folder.rmdir()
        raise


def quiet_loading() -> None:
    """No progress bars and notices of the libraries that load and save models, retries of downloads among them."""
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load_ranker(model: str, *, device: str | None, **options: Any) -> Ranker:
    """`pile_fast.students.load_ranker`, quietly, on a device of the command line."""
    import torch

    from pile_fast import students

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device; not built for it
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from error
    quiet_loading()
    try:
        return students.load_ranker(model, device=device, **options)
    except torch.OutOfMemoryError:
        raise
    except _damaged() as error:
        raise UserError(f"{model}: a file of the model is damaged or of another model: {error}") from error


def _damaged() -> tuple[type[Exception], ...]:
    """What the readers of a model's files raise about damaged ones, each its own."""
    from safetensors import SafetensorError

    return SafetensorError, RuntimeError, EOFError, UnicodeError, json.JSONDecodeError, struct.error, pickle.UnpicklingError


def write_json(path: Path, value: object) -> None:
    """A number that is not finite, for which JSON has no word, is null."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The value for JSON: a number that is not finite, for which it has no word, is None."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
