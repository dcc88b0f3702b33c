"""``pile-fast ensemble``: an ensemble of the teachers, added to the rows of a file of any size."""

from __future__ import annotations

import argparse
import inspect
import logging
import os
from pathlib import Path
from typing import Any

from pile_fast.cli.common import add_format, add_missing, add_options, add_qrels, flags_of, given, print_weights
from pile_fast.cli.errors import UserError
from pile_fast.data.files import refuse_same_file
from pile_fast.ensembles import OFFLINE
from pile_fast.options import EnsembleOptions
from pile_fast.printable import printable

# Flags that are options of the ensemble's function, by its argument.
_OPTIONS = (*flags_of(EnsembleOptions), "k")


def _takes(method: str, option: str) -> bool:
    return option in inspect.signature(OFFLINE[method]).parameters


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "ensemble",
        help="add an ensemble of the teachers to a file of any size",
        description="Reads queries with teacher_logits (and labels), and writes the same rows with a column more: "
        "ensemble_logits, a number per document, null where no teacher scored it. PILE learns one weight per teacher from all "
        "labelled queries of the input first, and prints them. From Parquet to Parquet only the labelled queries' logits "
        "are held in memory, whatever the size of the file, and a command that was killed resumes when it is run again.",
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT",
        help="a file of rows, several of one format (TREC: a run per teacher, FILE or NAME=FILE), or a folder of Parquet files",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="FILE", help=".parquet or .jsonl; with --ray a new folder")
    add_format(parser, "the input")
    add_qrels(parser)
    parser.add_argument("--method", choices=OFFLINE, default="pile", help="(default: %(default)s)")
    parser.add_argument(
        "--fit", metavar="FILE",
        help="rows with labels: 'pile' learns the teachers' weights from them (default: from the input), 'stacking' too "
        "(required), 'best' the one teacher to take (default: each query's best by its own labels)",
    )  # fmt: skip
    parser.add_argument(
        "--weights", metavar="FILE", help="pile: weights learned before, a teacher_weights.json of pile-fast train"
    )
    add_missing(parser)
    parser.add_argument("--keep-weights", action="store_true", help="keep the teachers' weights: ensemble_weights")
    parser.add_argument(
        "--replace", action="store_true", help="put the ensemble in the place of the teachers, as the one teacher 'ensemble'"
    )
    parser.add_argument("--ray", action="store_true", help="run on Ray Data: on a cluster, if one is connected")
    options = parser.add_argument_group("options of the method (defaults: docs/options.md)")
    flags = add_options(options, EnsembleOptions)
    flags.append(options.add_argument("--k", type=float, help="a document at rank r counts 1 / (k + r)"))
    for action in flags:
        methods = [method for method in OFFLINE if _takes(method, action.dest)]
        action.help = f"{', '.join(methods) if len(methods) < len(OFFLINE) else 'all methods'}: {action.help}"
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options = given(args, _OPTIONS)
    if unknown := sorted(name for name in options if not _takes(args.method, name)):
        flags = ", ".join("--" + name.replace("_", "-") for name in unknown)
        raise UserError(f"{flags}: not an option of --method {args.method}")
    if args.missing == "bottom" and args.normalize == "logit":
        raise UserError("--missing bottom: does not go with --normalize logit, there is nothing below a probability of 0")
    from pile_fast.data import TeacherWeights
    from pile_fast.data.trec import named_runs
    from pile_fast.offline.ensemble import OfflineEnsemble, ensemble_file, read_fit

    fit = None
    if args.fit:
        refuse_same_file(Path(args.output), [args.fit])
        fit = read_fit(args.fit)
    weights = TeacherWeights.load(args.weights) if args.weights else None
    if weights is not None and "normalize" in weights.options:  # they are for teachers on this scale
        options = {"normalize": weights.options["normalize"]} | options
    try:
        ensemble = OfflineEnsemble(
            args.method, keep_weights=args.keep_weights, replace=args.replace, fit=fit, weights=weights, missing=args.missing,
            **options,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error).replace("fit:", f"{args.fit}:", 1) if args.fit else str(error)) from error
    if args.ray:
        ensemble = _on_ray(args, ensemble)
    else:
        import torch
        from tqdm import tqdm

        # A core reads, one writes: more threads than the others only take time from them.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) - 2))
        inputs, teachers = named_runs(args.inputs)
        runs = {"qrels": args.qrels, "unjudged": args.unjudged, "teachers": teachers}
        with tqdm(unit=" queries", disable=None) as progress:  # None: only on a terminal
            ensemble = ensemble_file(inputs, args.output, ensemble, format=args.source, progress=progress.update, **runs)
    print_weights(ensemble.weights)
    print(f"Wrote {printable(args.output)}.")
    return 0


def _on_ray(args: argparse.Namespace, ensemble: Any) -> Any:
    if len(args.inputs) > 1 or args.source not in (None, "parquet") or args.qrels or args.unjudged is not None:
        raise UserError("--ray: expected one INPUT, a Parquet file or a folder of them, and no --qrels and --unjudged")
    from pile_fast.offline.ray import ensemble_folder

    logging.disable(logging.ERROR)  # Ray tells every step, and every error once more
    try:
        return ensemble_folder(args.inputs[0], args.output, ensemble)
    finally:
        logging.disable(logging.NOTSET)
