"""``pile-fast evaluate``: models, runs, teachers and ensembles on the same judged queries, with paired tests."""

from __future__ import annotations

import argparse
import math

from pile_fast.cli.common import (
    add_format,
    add_models,
    add_skip_bad_rows,
    named,
    print_left_out,
    real_number,
    require,
    whole_number,
    writable_folder,
)
from pile_fast.cli.errors import UserError
from pile_fast.cli.evaluate_inputs import read_inputs
from pile_fast.cli.evaluate_report import explain, print_table, write_report
from pile_fast.data import BadRows, atomic_path
from pile_fast.evaluation import DEFAULT_METRICS, EMPTY, Metric, evaluate
from pile_fast.evaluation.comparison_report import plot
from pile_fast.evaluation.metrics import GAINS


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="models, TREC runs, teachers and ensembles on the same judged queries, with confidence intervals and tests",
        description="Compares rankers on the same judged queries: TREC runs against qrels, or what a file of labelled queries "
        "holds. Means as trec_eval and ir-measures give them, 95 % confidence intervals, and paired significance tests "
        "against a baseline. With --output also metrics.json, with every query's values, and metrics.png.",
    )
    parser.add_argument(
        "data", metavar="DATA", nargs="*", help="TREC runs, each a system of its file's name; or a file of queries: .jsonl, "
        ".parquet, .txt (LETOR), ..."
    )  # fmt: skip
    add_format(parser, "DATA")
    add_skip_bad_rows(parser)
    parser.add_argument("--teachers", action="store_true", help="evaluate the file's teachers")
    parser.add_argument(
        "--column", choices=["ensemble_logits"], action="append", default=[], help="evaluate the file's ensemble"
    )
    parser.add_argument(
        "--model", metavar="NAME=MODEL", type=named("MODEL"), action="append", default=[],
        help="evaluate a model: a folder, or a name on the Hugging Face hub; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--run", metavar="NAME=FILE", type=named("FILE"), action="append", default=[], dest="runs",
        help="evaluate a TREC run file under a name; may be given several times",
    )  # fmt: skip
    parser.add_argument("--qrels", metavar="FILE", help="TREC qrels: the judgements, in place of labels in the file")
    parser.add_argument(
        "--unjudged", type=_unjudged, default="zero", metavar="{0,skip}",
        help="documents without a judgement keep their ranks and are not relevant (0, as in trec_eval), or are left out (skip)",
    )  # fmt: skip
    parser.add_argument(
        "--metrics", type=_metrics, default=list(DEFAULT_METRICS),
        help=f"default: {','.join(DEFAULT_METRICS)}; also opa; by ir-measures p@k, recall@k, success@k, judged@k, err@k, rbp",
    )  # fmt: skip
    parser.add_argument(
        "--gain", choices=GAINS, default="linear",
        help="of NDCG: linear = the grade, as in trec_eval (default); exponential = 2^grade - 1",
    )  # fmt: skip
    parser.add_argument("--baseline", metavar="NAME", help="test the other systems against this one")
    parser.add_argument(
        "--relevant-at", type=real_number(-math.inf), default=1.0, metavar="LABEL",
        help="a document is relevant from this label on, for MRR, MAP, P, recall, success and RBP (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--empty", choices=EMPTY, default="zero",
        help="judged queries without a relevant document count as 0, as in trec_eval (default), as 1, or are left out (skip)",
    )  # fmt: skip
    add_models(parser)
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the resampling (default: 0)")
    parser.add_argument("--output", metavar="DIR", help="where metrics.json and metrics.png go (default: nowhere)")
    parser.set_defaults(run=run)


def _metrics(text: str) -> list[str]:
    try:
        return list(dict.fromkeys(Metric(name.strip()).name for name in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("metrics: ")) from None


def _unjudged(text: str) -> str:
    rule = {"0": "zero", "zero": "zero", "skip": "skip"}.get(text)
    if rule is None:
        raise argparse.ArgumentTypeError(f"expected 0 or skip, got {text!r}")
    return rule


def run(args: argparse.Namespace) -> int:
    require("evaluate", "rich", "tqdm", *["matplotlib"] * bool(args.output), *["transformers"] * bool(args.model))
    if any(Metric(name).outside for name in args.metrics):
        require(f"evaluate --metrics {','.join(args.metrics)}", "ir_measures")
    if not (args.teachers or args.column or args.model or args.runs or args.qrels):
        raise UserError(
            "nothing to evaluate: give --teachers, --column, --model or --run for a file of queries, --qrels for TREC runs"
        )
    output = writable_folder(args.output) if args.output else None
    bad_rows = BadRows() if args.skip_bad_rows else None
    inputs = read_inputs(args, bad_rows)
    if not inputs.systems:
        raise UserError("nothing to evaluate: give --teachers, --column, --model or --run")
    if args.baseline is not None and args.baseline not in inputs.systems:
        raise UserError(f"--baseline {args.baseline}: expected one of {', '.join(inputs.systems)}")
    evaluation = evaluate(
        {name: system.scores for name, system in inputs.systems.items()}, inputs.labels, inputs.cu_seqlens,
        metrics=args.metrics, baseline=args.baseline, relevant_at=args.relevant_at, gain=args.gain,
        unjudged=args.unjudged, empty=args.empty, seed=args.seed, query_ids=inputs.query_ids,
    )  # fmt: skip
    if output:
        write_report(output / "metrics.json", evaluation, inputs, args, bad_rows)
        with atomic_path(output / "metrics.png") as temporary:
            plot(evaluation, args.baseline, temporary)
    print_table(evaluation, inputs.systems, args)
    print("\n".join(explain(evaluation, inputs, args)))
    print_left_out(bad_rows)
    if output:
        print(f"Wrote {output / 'metrics.json'} and {output / 'metrics.png'}.")
    return 0
