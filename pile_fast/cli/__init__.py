"""The ``pile-fast`` command: one module per subcommand, each with `add_parser(commands)` and `run(args) -> exit code`.

Building the parser imports no optional library; a command imports what it needs when it runs. Whatever stops a command
reaches `main`, and `pile_fast.cli.errors` reports it in one line.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

import pile_fast
from pile_fast.cli import convert, demo, ensemble, evaluate, info, inspect, score, train
from pile_fast.cli.common import made_folders
from pile_fast.cli.errors import INTERRUPTED, any_characters, ended, leave, warnings_as_lines
from pile_fast.printable import printable


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {printable(message)} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code.

    0: done. 1: it could not be done; one line on stderr says why. 2: a command line that cannot be read. 130: interrupted.
    141: the reader of its output closed it. A bug of the package raises.

    Args:
        argv: the command line; None = the process's own: then an interrupt ends the process here.
    """
    args = argparse.Namespace()
    try:
        with any_characters(), warnings_as_lines(), made_folders():
            try:
                args = _parser().parse_args(argv)
                code = args.run(args)
            except SystemExit as exit:  # after --help, --version or a wrong command line
                code = exit.code
            print(end="", flush=True)
            return code
    except (Exception, KeyboardInterrupt) as error:
        code = ended(error, getattr(args, "output", None) or getattr(args, "output_dir", None))
        if code is None:
            raise
        if argv is None and code == INTERRUPTED:
            leave(code)
        return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pile-fast", description="Distil several teacher rankers into one student (PILE).")
    parser.add_argument("--version", action="version", version=f"pile_fast {pile_fast.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    for command in (demo, convert, score, ensemble, inspect, train, evaluate, info):
        command.add_parser(commands)
    return parser
