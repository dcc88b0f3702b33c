"""``pile-fast demo``: students of the mean ensemble, of labels and of PILE on held-out queries, in one table and a picture."""

from __future__ import annotations

import argparse

import torch

import pile_fast
from pile_fast.cli.common import quiet_loading, require, whole_number, writable_folder, write_json
from pile_fast.cli.errors import UserError
from pile_fast.data import RankedLists, find_data, load_mq2008, make_synthetic

NOTES = """\
{of} with 95 % intervals over the test queries. Differences to the student
of the mean, and to that of the same labels only, are taken query by query: judge
by these. "20 %": the other training queries are unlabelled, and still distilled."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo",
        help="what PILE gains over the mean of the teachers and over labels alone, on MQ2008 or generated data",
        description="Distils several teachers into small students and compares them on held-out queries: of labels only, of "
        "the teachers' mean, and of PILE, whose weights all queries share; with all labels, and with 20 % of them. The "
        "teachers are MQ2008's real TREC systems if that is found, and generated ones otherwise.",
    )
    parser.add_argument("--data", metavar="DIR", help="folder with mq2008/ and mq2008_agg/ (default: $PILE_FAST_DATA, data/)")
    parser.add_argument("--output", metavar="DIR", default="runs/demo", help="where results go (default: %(default)s)")
    parser.add_argument("--epochs", type=whole_number(1), default=10, help="per student (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=whole_number(1), default=3,
        help="students of each kind per fold, each with another seed (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="one of the five folds, and one student of each kind: seconds")
    parser.add_argument(
        "--missing",
        choices=("bottom", "nan"),
        default="bottom",
        help="what a document is that a TREC system did not return: below the end of its list, or not scored by it "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="of the first students and of generated data (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    require("the demo", "matplotlib", "rich", "pile_fast.students")
    import rich.console
    import rich.progress

    from pile_fast.cli import demo_report
    from pile_fast.cli.demo_students import RUNS, cross_validate

    torch.set_num_threads(1)  # networks and lists this small: more threads would mostly wait for each other
    output = writable_folder(args.output)
    lists, name, source = _load(args.data, args.missing, args.seed)
    print(source, flush=True)
    quiet_loading()
    folds, repeats = (1,) if args.quick else tuple(range(1, 6)), 1 if args.quick else args.repeats
    with rich.progress.Progress(console=rich.console.Console(stderr=True)) as progress:
        task = progress.add_task("students", total=len(folds) * repeats * len(RUNS))
        outcome = cross_validate(
            lists, folds=folds, repeats=repeats, epochs=args.epochs, seed=args.seed, trained=lambda: progress.advance(task)
        )
    students, teachers = demo_report.student_rows(outcome), demo_report.teacher_rows(outcome)

    test = outcome.test
    relevant = sum(bool((test[q]["labels"] > 0).any()) for q in range(len(test)))
    caption = f"{name}, {len(test)} queries, {relevant} with a relevant document"
    demo_report.print_tables(students, teachers, caption)
    print(NOTES.format(of=f"Means of {repeats} seeds" if repeats > 1 else "Means"))
    outcome.student.save_pretrained(output / "student")
    report = {
        "data": source, "folds": folds, "repeats": repeats, "seed": args.seed, "epochs": args.epochs,
        "pile_fast": pile_fast.__version__, "torch": torch.__version__, "test_queries": len(test),
        "test_queries_with_a_relevant_document": relevant, **demo_report.as_json(students, teachers),
    }  # fmt: skip
    write_json(output / "metrics.json", report)
    demo_report.plot(students, caption, output / "quality.png")
    print(f"Wrote {output / 'student'}, {output / 'metrics.json'} and {output / 'quality.png'}.")
    return 0


def _load(data: str | None, missing: str, seed: int) -> tuple[RankedLists, str, str]:
    """The data, its name, and a line on what it is."""
    try:
        folder = find_data("mq2008", data)
        if folder is None:
            source = (
                "No MQ2008 found (--data, $PILE_FAST_DATA or data/mq2008): this is GENERATED data, whose teachers are made to "
                "differ in how far they can be trusted. It shows how things work, not how well."
            )
            return make_synthetic(seed=seed), "generated data", source
        lists = load_mq2008(folder, missing=missing)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    source = (
        f"MQ2008 in {folder}: {len(lists)} queries, {len(lists.teacher_names)} real TREC systems as teachers, "
        f"what one did not return read as {'below the end of its list' if missing == 'bottom' else 'not scored'}"
    )
    return lists, "MQ2008", source
