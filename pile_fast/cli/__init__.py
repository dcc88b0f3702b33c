"""The ``pile-fast`` command: one module per subcommand, each with `add_parser(commands)` and `run(args) -> exit code`.

Building the parser imports no optional library; a command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import pile_fast
from pile_fast.cli import convert, demo, ensemble, evaluate, info, inspect, score, train
from pile_fast.cli.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, 1 for what the user can put right, 2 for a wrong command line."""
    parser = _Parser(prog="pile-fast", description="Distil several teacher rankers into one student (PILE).")
    parser.add_argument("--version", action="version", version=f"pile_fast {pile_fast.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    for command in (demo, convert, score, ensemble, inspect, train, evaluate, info):
        command.add_parser(commands)
    try:
        args = parser.parse_args(argv)
    except SystemExit as exit:  # after --help, --version or a wrong command line
        return exit.code
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"pile-fast: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of the output, `head` say, had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        return 141
    except KeyboardInterrupt:
        print("pile-fast: interrupted", file=sys.stderr)
        return 130
