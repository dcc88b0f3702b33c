"""``pile-fast demo``: teachers, their ensembles and distilled students on held-out queries, in one table."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pile_fast
from pile_fast.cli.common import quiet_loading, require, whole_number, writable_folder
from pile_fast.cli.errors import UserError
from pile_fast.data import RankedLists, find_data, load_mq2008, make_synthetic

QUERIES_PER_STEP = 32
LEARNING_RATE = 1e-3
STUDENT: dict[str, Any] = {"hidden_sizes": (64, 64), "dropout": 0.1}
# Name and options of the students' losses; all of them see the labels of the training queries alone.
STUDENTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("labels alone", {"alpha": 0.0}),
    ("mean ensemble", {"iterations": 0}),
    ("mean ensemble + labels", {"iterations": 0, "alpha": 0.5}),
    ("PILE", {}),
    ("PILE + labels", {"alpha": 0.5}),
)
SAVED_STUDENT = "PILE"


@dataclasses.dataclass
class Row:
    """One ranker on the test queries."""

    kind: str  # "teacher", "baseline", "ensemble", "student"
    name: str
    sees_labels: bool  # of the very queries it is evaluated on
    quality: dict[str, float | None]


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo",
        help="teachers, ensembles and distilled students on MQ2008 (or generated data), in one table",
        description="Ensembles MQ2008's real TREC systems, distils students from them and compares all on held-out "
        "queries. Without MQ2008 it runs on generated data.",
    )
    parser.add_argument("--data", metavar="DIR", help="folder with mq2008/ and mq2008_agg/ (default: $PILE_FAST_DATA, data/)")
    parser.add_argument("--output", metavar="DIR", default="runs/demo", help="where results go (default: %(default)s)")
    parser.add_argument("--fold", type=int, choices=range(1, 6), default=1, help="LETOR fold (default: %(default)s)")
    parser.add_argument("--epochs", type=whole_number(1), default=15, help="per student (default: %(default)s)")
    parser.add_argument(
        "--missing",
        choices=("bottom", "nan"),
        default="bottom",
        help="what a document is that a TREC system did not return: below the end of its list, or not scored by it "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="of the students and of generated data (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    require("the demo", "matplotlib", "rich", "pile_fast.trainer")
    torch.set_num_threads(1)  # networks and lists this small: more threads would mostly wait for each other
    output = writable_folder(args.output)
    lists, source, returned = _load(args.data, args.missing, args.seed)
    print(source, flush=True)
    train, validation, test = lists.fold(args.fold)

    rows = [*_teachers(test), _row("baseline", "count of teachers that returned it", returned(test), test)]
    rows += _ensembles(train, test)
    for name, student in _students(train, validation, args):
        with torch.no_grad():
            rows.append(_row("student", f"student of {name}", student(test.features.to(student.device)).cpu(), test))
        if name == SAVED_STUDENT:
            student.save_pretrained(output / "student")

    relevant = sum(bool((test[q]["labels"] > 0).any()) for q in range(len(test)))
    caption = f"fold {args.fold}, {len(test)} test queries, {relevant} with a relevant document"
    _print_table(rows, caption)
    report = {
        "data": source, "fold": args.fold, "seed": args.seed, "epochs": args.epochs, "pile_fast": pile_fast.__version__,
        "torch": torch.__version__, "test_queries": len(test), "test_queries_with_a_relevant_document": relevant,
        "rows": [dataclasses.asdict(row) for row in rows],
    }  # fmt: skip
    (output / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
    _plot(rows, caption, output / "quality.png")
    print(f"Wrote {output / 'student'}, {output / 'metrics.json'} and {output / 'quality.png'}.")
    return 0


def _load(data: str | None, missing: str, seed: int) -> tuple[RankedLists, str, Callable[[RankedLists], Tensor]]:
    """The data, a line on what it is, and how many teachers returned each document."""
    try:
        folder = find_data("mq2008", data)
        if folder is None:
            source = (
                "No MQ2008 found (--data, $PILE_FAST_DATA or data/mq2008): this is GENERATED data, which shows how "
                "things work, not how well."
            )
            return make_synthetic(seed=seed), source, lambda lists: (~lists.teacher_logits.isnan()).sum(1).float()
        lists = load_mq2008(folder, missing=missing)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    source = (
        f"MQ2008 in {folder}: {len(lists)} queries, {len(lists.teacher_names)} real TREC systems as teachers, "
        f"what one did not return read as {'below the end of its list' if missing == 'bottom' else 'not scored'}"
    )
    return lists, source, lambda lists: (lists.teacher_logits > 0).sum(1).float()


def _row(kind: str, name: str, scores: Tensor, lists: RankedLists, sees_labels: bool = False) -> Row:
    from pile_fast.trainer import ranking_quality

    scores = scores.nan_to_num(nan=-math.inf)  # what no teacher scored comes last
    quality = ranking_quality(scores, lists.labels, cu_seqlens=lists.cu_seqlens)
    return Row(kind, name, sees_labels, {name: value if math.isfinite(value) else None for name, value in quality.items()})


def _teachers(test: RankedLists) -> list[Row]:
    columns = zip(test.teacher_names, test.teacher_logits.unbind(1), strict=True)
    rows = [_row("teacher", name, scores, test) for name, scores in columns]
    return sorted(rows, key=lambda row: row.quality["ndcg@10"] or 0.0, reverse=True)


def _ensembles(train: RankedLists, test: RankedLists) -> Iterator[Row]:
    """Every ensemble that needs no student; those that need labels are given the test queries' own."""
    from pile_fast.ensembles import ENSEMBLES, NEEDS_LABELS, NEEDS_STUDENT, StackingEnsemble

    layout = {"cu_seqlens": test.cu_seqlens}
    stacking = StackingEnsemble().fit(train.teacher_logits, train.labels, cu_seqlens=train.cu_seqlens)
    logits = stacking(test.teacher_logits, **layout).logits
    yield _row("ensemble", "stacking (fit on the training queries)", logits, test)
    for name, ensemble in ENSEMBLES.items():
        if name not in NEEDS_STUDENT:
            logits = ensemble(test.teacher_logits, test.labels, **layout).logits
            yield _row("ensemble", f"{name} ensemble", logits, test, sees_labels=name in NEEDS_LABELS)


def _students(train: RankedLists, validation: RankedLists, args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Train one student per loss, alike in all else; each at its best epoch on the validation queries."""
    import rich.console
    import rich.progress
    import transformers

    from pile_fast.students import FeatureRanker, FeatureRankerConfig
    from pile_fast.trainer import PileTrainer

    quiet_loading()

    class Bar(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.task = progress.add_task(f"student of {name}", total=state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            progress.advance(self.task)

    with (
        tempfile.TemporaryDirectory() as checkpoints,
        rich.progress.Progress(console=rich.console.Console(stderr=True)) as progress,
    ):
        for name, options in STUDENTS:
            transformers.set_seed(args.seed)
            student = FeatureRanker(FeatureRankerConfig(num_features=train.features.shape[1], **STUDENT))
            trainer = PileTrainer(
                student.fit_standardization(train.features),
                transformers.TrainingArguments(
                    checkpoints, per_device_train_batch_size=QUERIES_PER_STEP, learning_rate=LEARNING_RATE,
                    num_train_epochs=args.epochs, eval_strategy="epoch", save_strategy="epoch", save_only_model=True,
                    save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="ndcg@10", seed=args.seed,
                    logging_strategy="no", report_to="none", disable_tqdm=True,
                    dataloader_pin_memory=torch.cuda.is_available(),
                ),
                loss=pile_fast.PILELoss(reduction="none", **options),
                train_dataset=train, eval_dataset=validation, callbacks=[Bar()],
            )  # fmt: skip
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
            yield name, student.eval()


def _print_table(rows: list[Row], caption: str) -> None:
    import rich.table

    table = rich.table.Table(title=f"Held-out queries: {caption}")
    table.add_column("ranker")
    for name in rows[0].quality:
        table.add_column(name.upper(), justify="right")
    for i, row in enumerate(rows):
        values = ("–" if value is None else f"{value:.3f}" for value in row.quality.values())
        last = i + 1 == len(rows) or rows[i + 1].kind != row.kind
        table.add_row(row.name + " *" * row.sees_labels, *values, end_section=last)
    rich.print(table)
    print(
        "* An ensemble that is given the labels of the very queries it is evaluated on: a training target, not a\n"
        "  ranker to compare with. The fair comparison is among the students: they see training labels alone.\n"
        "One fold and one seed: another seed alone moves a student's NDCG@10 by up to about a hundredth."
    )


def _plot(rows: list[Row], caption: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = {"teacher": "tab:gray", "baseline": "tab:brown", "ensemble": "tab:blue", "student": "tab:green"}
    figure = Figure(figsize=(8, 1.5 + 0.24 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for position, row in enumerate(reversed(rows)):
        value = row.quality["ndcg@10"] or 0.0
        axes.barh(position, value, color=colors[row.kind], hatch="//" if row.sees_labels else None, edgecolor="white")
        axes.text(value, position, f" {value:.3f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row.name + " *" * row.sees_labels for row in reversed(rows)], fontsize=8)
    axes.set_xlabel("NDCG@10  (* given the labels of the queries it is evaluated on)")
    axes.set_title(caption, fontsize=10)
    axes.set_xlim(0, 1.1)
    axes.margins(y=0.01)
    figure.savefig(path, dpi=120)
