"""``pile-fast train``: distil the teachers of a data file into a student, with every option of transformers' Trainer."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib.metadata
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

import pile_fast
from pile_fast.cli.common import (
    add_format,
    add_missing,
    add_options,
    add_skip_bad_rows,
    flags_of,
    given,
    made_folders,
    print_left_out,
    print_weights,
    quiet_loading,
    whole_number,
    writable_folder,
)
from pile_fast.cli.errors import DONE, FAILED, UserError, report
from pile_fast.options import EnsembleOptions, LossOptions

_KINDS = ("features", "cross-encoder", "bi-encoder")
_LOSS_OPTIONS = (*flags_of(LossOptions, EnsembleOptions), "prior", "backend")
# Those that an ensemble made beforehand leaves nothing to do.
_ENSEMBLE_OPTIONS = (*(name for name in flags_of(EnsembleOptions) if name not in LossOptions._fields), "prior")
# Without it a folder cannot be loaded as a model, so it is written last.
_LAST_FILE = "config.json"


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("train", help="distil the teachers of a data file into a student", add_help=False)
    # The Trainer's own options can only be listed by importing it, which only this command should have to do.
    parser.parse_known_args = lambda args, namespace=None: _parse(_parser(parser), args, namespace)


def _parse(parser: argparse.ArgumentParser, args: Sequence[str], namespace: Any) -> tuple[argparse.Namespace, list[str]]:
    """Parse the config file's options, then the command line's on top."""
    find = type(parser)(prog=parser.prog, add_help=False, allow_abbrev=False)
    find.add_argument("--config")
    config = find.parse_known_args(args)[0].config
    if config is not None and not {"-h", "--help"} & set(args):
        error = parser.error
        parser.error = lambda message: error(f"--config {config}: {message}")  # type: ignore[method-assign]
        namespace, unknown = parser.parse_known_args(_config_arguments(parser, config), namespace)
        if unknown:
            parser.error(f"unknown option {unknown[0].removeprefix('--')!r}")
        parser.error = error  # type: ignore[method-assign]
    namespace, unknown = parser.parse_known_args(args, namespace)
    if not unknown:
        _check(parser, namespace)
    return namespace, unknown


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What neither the command line nor the config file gave."""
    for flag in ("DATA", "--student", "--output-dir"):
        if not getattr(args, flag.strip("-").replace("-", "_").lower(), None):
            parser.error(f"{flag} is missing, here and in a --config file")
    if args.student != "features" and not args.model:
        parser.error(f"--student {args.student} needs --model, the encoder to start from")


def _config_arguments(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """The command line that says what a YAML or JSON file says."""
    import yaml

    try:
        options = yaml.safe_load(Path(path).read_text())  # JSON is YAML
    except OSError as error:
        parser.error(str(error.strerror))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(" ".join(str(error).split()))
    if not isinstance(options, dict):
        parser.error(f"expected options as 'name: value', got {type(options).__name__}")
    switches = {flag for action in parser._actions if action.nargs == 0 for flag in action.option_strings}
    arguments: list[str] = []
    for name, value in options.items():
        flag = f"--{str(name).replace('_', '-')}"
        if value is None or (value is False and flag in switches):
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        values = [] if flag in switches and value is True else [str(value) for value in values]
        # Data first: after an option of several values it would be read as one of them.
        arguments = values + arguments if name == "data" else [*arguments, flag, *values]
    return arguments


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says a default where there is one to say."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, argparse.SUPPRESS) else super()._get_help_string(action)


def _parser(stub: argparse.ArgumentParser) -> argparse.ArgumentParser:
    try:
        import accelerate  # noqa: F401
        from transformers import HfArgumentParser, TrainingArguments
    except ImportError as error:
        stub.exit(1, f"pile-fast: error: training needs {error.name}: pip install 'pile_fast[train]'\n")
    own = _own_options()
    taken = {action.dest for action in own._actions} | {"remove_unused_columns", "label_names"}
    fields = [copy.copy(field) for field in dataclasses.fields(TrainingArguments) if field.name not in taken]
    options = dataclasses.make_dataclass(
        "TrainerOptions",
        [(field.name, field.type, field) for field in fields],
        namespace={"_argument_group_name": "options of transformers' Trainer"},
    )
    trainer = HfArgumentParser(options, add_help=False)  # type: ignore[arg-type]
    trainer.set_defaults(eval_strategy=None)
    parser = type(stub)(
        prog=stub.prog,
        usage="%(prog)s DATA [DATA ...] --student KIND --output-dir DIR [--model NAME] [options]",
        description="Distil the teachers' logits in DATA (JSON lines, Parquet, ...; see docs/data.md) into a student: a small "
        "network on features, a cross-encoder or a bi-encoder. How much each teacher counts is learned from all labelled "
        "queries before the first step (PILE), and saved as teacher_weights.json.",
        epilog="Several processes: torchrun --nproc-per-node=2 -m pile_fast train ...",
        parents=[own, trainer],
        add_help=False,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, trainer_options=[field.name for field in fields])
    return parser


def _own_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    data = parser.add_argument_group("data")
    data.add_argument("data", nargs="*", metavar="DATA", default=argparse.SUPPRESS, help="training rows, a query each")
    data.add_argument("--validation", nargs="+", metavar="FILE", help="rows to evaluate on: after every epoch, unless "
                      "--eval-strategy says otherwise, and at the end")  # fmt: skip
    add_format(data, "all files")
    add_skip_bad_rows(data)
    data.add_argument("--teacher-columns", nargs="+", metavar="NAME", help="the teachers to learn from, by name (default: all)")
    add_missing(data)
    data.add_argument("--ensemble-logits", action="store_true", help="learn from the ensemble that `pile-fast ensemble` wrote "
                      "into the data, as it is, instead of from the teachers")  # fmt: skip

    student = parser.add_argument_group("student")
    student.add_argument("--student", choices=_KINDS, metavar="KIND", help=f"what to train: {', '.join(_KINDS)}")
    student.add_argument("--model", metavar="NAME_OR_PATH", help="where a text student starts from: a folder or a name on the "
                         "Hugging Face hub; for features a saved student to train on")  # fmt: skip
    student.add_argument("--num-layers", type=whole_number(1), metavar="K", help="keep the first K layers of the encoder")
    student.add_argument("--max-length", type=whole_number(1), metavar="N", help="tokens per text, or pair of texts for a "
                         "cross-encoder (default: what the model allows)")  # fmt: skip
    student.add_argument("--hidden-sizes", nargs="*", type=whole_number(1), metavar="N", default=[64, 64],
                         help="features: widths of the hidden layers")  # fmt: skip
    student.add_argument("--dropout", type=float, default=0.1, help="features: after every hidden layer")
    student.add_argument("--pooling", choices=("mean", "cls"), help="bi-encoder: what embeds a text (default: what a "
                         "sentence-transformers folder says, else mean)")  # fmt: skip
    student.add_argument("--similarity", choices=("cosine", "dot"), help="bi-encoder: of query and document (default: cosine)")
    student.add_argument("--scale", type=float, help="bi-encoder: factor on the similarity (default: 20)")

    loss = parser.add_argument_group("loss (docs/options.md)")
    add_options(loss, LossOptions, EnsembleOptions, defaults=True)
    loss.add_argument(
        "--prior", nargs="+", type=float, metavar="W", help="the teachers' weights to start from (default: equal)"
    )
    loss.add_argument("--backend", help="of the loss: see pile-fast info (default: auto)")

    run = parser.add_argument_group("run")
    run.add_argument("--output-dir", "--output_dir", metavar="DIR", help="checkpoints, metrics and the trained student")
    run.add_argument("--config", metavar="FILE", help="YAML or JSON file of options as 'name: value', with DATA under 'data'; "
                     "the command line goes before it")  # fmt: skip
    run.add_argument("--resume-from-checkpoint", "--resume_from_checkpoint", nargs="?", const=True, metavar="DIR",
                     help="resume from a checkpoint; without DIR from the last complete one in the output folder, or from the "
                     "beginning if there is none yet")  # fmt: skip
    run.add_argument("--max-documents-per-batch", type=whole_number(1), metavar="N", help="texts the encoder sees at a time: "
                     "bounds the memory of long lists without changing the loss, for a second forward")  # fmt: skip
    run.add_argument("--ndcg-k", type=whole_number(1), default=10, metavar="K", help="rank cut of the NDCG at evaluation")
    run.add_argument("--no-loss-components", action="store_true", help="do not log the parts of the loss and the teachers' "
                     "weights")  # fmt: skip
    run.add_argument("-h", "--help", action="help", help="show this and exit")
    return parser


def run(args: argparse.Namespace) -> int:
    from safetensors import SafetensorError

    try:
        with made_folders():  # also where the process is left below
            return _train(args)
    except FloatingPointError as error:  # on all processes
        line = _stopped(error, args.output_dir)
        if not torch.distributed.is_initialized():
            raise UserError(line) from error
        if torch.distributed.get_rank() == 0:
            report("error", line)
        _leave(FAILED)
    except (SafetensorError, RuntimeError) as error:
        # What the two writers of a checkpoint say when the disk is full, each without the file's name.
        if isinstance(error, SafetensorError) or "inline_container" in str(error):
            raise UserError(f"--output-dir {args.output_dir}: cannot write a checkpoint: {error}") from error
        raise


def _stopped(error: FloatingPointError, output: str) -> str:
    """What is left of a training that came to numbers that are not finite."""
    from pile_fast.trainer import last_checkpoint

    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    checkpoint = last_checkpoint(output, processes=processes)
    kept = f"the last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint"
    return f"{error}; training stopped there and {kept}. Look at these queries, or try a lower --learning-rate"


def _settings(args: argparse.Namespace) -> Any:
    """transformers' TrainingArguments."""
    import transformers

    eval_strategy = args.eval_strategy or ("epoch" if args.validation else "no")
    options = {name: getattr(args, name) for name in args.trainer_options} | {"eval_strategy": eval_strategy}
    with _options_need_libraries():
        return transformers.TrainingArguments(output_dir=args.output_dir, **options)


@contextlib.contextmanager
def _options_need_libraries() -> Iterator[None]:
    """An option of the Trainer's whose library is not installed, as a `UserError`."""
    try:
        yield
    except importlib.metadata.PackageNotFoundError as error:  # transformers' own, with a sentence for a name
        library = error.name.split("'")[1] if "'" in error.name else error.name
        raise UserError(f"an option of the Trainer needs {library}, which is not installed: pip install '{library}'") from error
    except (ImportError, RuntimeError) as error:
        raise UserError(" ".join(str(error).split())) from error


def _train(args: argparse.Namespace) -> int:
    import transformers

    from pile_fast.students.ranker import model_config
    from pile_fast.trainer import PileTrainer, last_checkpoint

    quiet_loading()
    warnings.filterwarnings("ignore", "'pin_memory' argument is set as true but no accelerator is found")
    loss = _loss(args)
    settings = _settings(args)
    if args.model:
        model_config(args.model)  # before anything that takes time
    output = _output_folder(args)
    checkpoint = args.resume_from_checkpoint
    if checkpoint is True:
        checkpoint = last_checkpoint(output, processes=settings.world_size)
        if settings.should_log:
            print(f"Resuming from {checkpoint}." if checkpoint else f"No complete checkpoint in {output}: starting anew.")

    with settings.main_process_first():
        train = _rows(args, args.data)
        names = _teachers_of(train)
        validation = _rows(args, args.validation, evaluated=names) if args.validation else None
    _check_teachers(args, names)
    if settings.should_log:
        _warn_of_missing(args, train, names)
    transformers.set_seed(settings.seed)
    model, tokenizer, collator = _student(args, train)
    with _options_need_libraries():
        trainer = PileTrainer(
            model, settings, data_collator=collator, processing_class=tokenizer, train_dataset=train,
            eval_dataset=validation, loss=loss, max_documents_per_batch=args.max_documents_per_batch, k=args.ndcg_k,
            log_components=not args.no_loss_components,
        )  # fmt: skip
    trainer.train(resume_from_checkpoint=checkpoint)
    if validation is not None:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        if trainer.is_world_process_zero():
            print(", ".join(f"{name.removeprefix('eval_')} {metrics[name]:.4f}" for name in metrics if _is_quality(name)))
    _save(trainer, output)
    if trainer.is_world_process_zero():
        print_weights(trainer.teacher_weights())
        print(f"Wrote {output}.")
    if torch.distributed.is_initialized():
        _leave(DONE)
    return DONE


def _leave(code: int) -> NoReturn:
    """End one of several processes, together with the others.

    To free a process group is to join gloo's thread, while that may wait for the interpreter's lock to free what the barrier
    used: the process ends without.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_quality(name: str) -> bool:
    return name.startswith("eval_") and name.split("@")[0].removeprefix("eval_") in ("loss", "ndcg", "mrr", "map", "pnr")


def _loss(args: argparse.Namespace) -> pile_fast.PILELoss:
    options = given(args, _LOSS_OPTIONS)
    if args.ensemble_logits:
        if idle := [*given(args, (*_ENSEMBLE_OPTIONS, "teacher_columns"))]:
            flag = idle[0].replace("_", "-")
            raise UserError(f"--{flag}: does not go with --ensemble-logits, which is an ensemble already")
        if args.missing == "bottom":
            raise UserError("--missing bottom: is for `pile-fast ensemble`, which made what --ensemble-logits reads")
        options |= {"iterations": 0, "normalize": "none"}
    elif args.missing == "bottom" and args.normalize == "logit":
        raise UserError("--missing bottom: does not go with --normalize logit, there is nothing below a probability of 0")
    if "prior" in options:
        options["prior"] = torch.tensor(options["prior"])
    return pile_fast.PILELoss(reduction="none", **options)


def _output_folder(args: argparse.Namespace) -> Path:
    output = writable_folder(args.output_dir, "--output-dir")
    if not args.resume_from_checkpoint and (any(output.glob("checkpoint-*")) or (output / _LAST_FILE).exists()):
        raise UserError(
            f"--output-dir {output}: holds a training run already; resume it (--resume-from-checkpoint), remove it, or "
            "write elsewhere"
        )
    return output


def _rows(args: argparse.Namespace, paths: list[str], evaluated: Sequence[str] | None = None) -> Any:
    """The rows as a data set that holds what the student and the loss need.

    Args:
        evaluated: for rows of evaluation, the teachers of training. Theirs are the same or none.
    """
    from pile_fast.data import BadRows, RankedLists, load_dataset, missing_as_bottom, read_rows

    bad_rows = BadRows() if args.skip_bad_rows else None
    if args.student == "features":
        rows = read_rows(paths, format=args.source, bad_rows=bad_rows)
        data = RankedLists.from_rows(_choose_teachers(row, args, evaluated) for row in rows)
        if args.missing == "bottom":
            data = data.with_teachers(missing_as_bottom(data.teacher_logits, data.cu_seqlens), data.teacher_names)
    else:
        data = load_dataset(paths, format=args.source, bad_rows=bad_rows)
        for column in ("query", "documents"):
            if missing := data.data.column(column).is_null().index(True).as_py() + 1:
                of = f"{', '.join(paths)}: query {data[missing - 1]['query_id']!r}"
                raise UserError(f"{of}: no {column!r}, which a {args.student} needs")
        other = _choose_teachers(data[0], args, evaluated)["teachers"] != data[0]["teachers"]
        if other or args.missing == "bottom":
            data = data.with_transform(lambda columns: _each_row(columns, lambda row: _as_told(row, args, evaluated)))
    print_left_out(bad_rows)
    return data


def _as_told(row: dict, args: argparse.Namespace, evaluated: Sequence[str] | None) -> dict:
    from pile_fast.data.missing import row_with_bottom

    row = _choose_teachers(row, args, evaluated)
    return row_with_bottom(row) if args.missing == "bottom" else row


def _each_row(columns: dict[str, list], change: Callable[[dict], dict]) -> dict[str, list]:
    rows = [change(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]
    return {name: [row[name] for row in rows] for name in columns}


def _choose_teachers(row: dict, args: argparse.Namespace, evaluated: Sequence[str] | None) -> dict:
    """The row with the teachers to learn from; one of evaluation may have none, else it has those of training."""
    from pile_fast.data import ensemble_as_teacher

    if args.ensemble_logits:
        if evaluated is None or row["ensemble_logits"] is not None:
            return ensemble_as_teacher(row)
        return row | {"teacher_logits": [[] for _ in row["teacher_logits"]], "teachers": []}
    names = args.teacher_columns if evaluated is None else evaluated
    if not names or list(names) == row["teachers"] or (evaluated is not None and not row["teachers"]):
        return row
    if unknown := [name for name in names if name not in row["teachers"]]:
        known = ", ".join(row["teachers"]) or "none"
        flag = "--teacher-columns" if evaluated is None else "--validation"
        there = "in the data" if evaluated is None else "in its rows, as in those of training"
        raise UserError(f"{flag}: no teacher {unknown[0]!r} {there}, there are: {known}")
    columns = [row["teachers"].index(name) for name in names]
    logits = [[scores[m] for m in columns] for scores in row["teacher_logits"]]
    return row | {"teacher_logits": logits, "teachers": list(names)}


def _teachers_of(data: Any) -> Sequence[str]:
    return data.teacher_names if hasattr(data, "teacher_names") else data[0]["teachers"]


def _warn_of_missing(args: argparse.Namespace, data: Any, names: Sequence[str]) -> None:
    """Say that many of the scores to learn from are missing."""
    from pile_fast.data.missing import many_missing

    if args.missing == "bottom" or args.ensemble_logits or not names:
        return
    if hasattr(data, "teacher_logits"):
        missing = data.teacher_logits.isnan()
    else:  # of the file's teachers those that are learned from
        flat = data.data.column("teacher_logits").combine_chunks().flatten().flatten()
        every = data.with_format(None)[0]["teachers"]
        missing = torch.from_numpy(flat.is_null().to_numpy(zero_copy_only=False)).view(-1, len(every))
        missing = missing[:, [every.index(name) for name in names]]
    if text := many_missing(int(missing.sum()), missing.numel()):
        warnings.warn(f"{', '.join(args.data)}: {text}", stacklevel=2)


def _check_teachers(args: argparse.Namespace, names: Sequence[str]) -> None:
    if not names and args.alpha != 0:
        raise UserError("the data has no teacher_logits: add teachers (pile-fast score), or train on the labels with --alpha 0")
    if args.prior is not None and len(args.prior) != len(names):
        raise UserError(f"--prior: expected a weight for each of the {len(names)} teachers, got {len(args.prior)}")


def _student(args: argparse.Namespace, train: Any) -> tuple[Any, Any, Any]:
    """(model, tokenizer or None, collator)."""
    from pile_fast.data.collator import BiEncoderCollator, CrossEncoderCollator, FeatureCollator
    from pile_fast.students import FeatureRanker, FeatureRankerConfig, load_ranker
    from pile_fast.students.ranker import load_bi_encoder, load_cross_encoder, load_tokenizer

    if args.student == "features":
        if args.model:
            return load_ranker(args.model, kind="features", device="cpu").model, None, FeatureCollator()
        config = FeatureRankerConfig(train.features.shape[1], args.hidden_sizes, args.dropout)
        return FeatureRanker(config).fit_standardization(train.features), None, FeatureCollator()
    collator: CrossEncoderCollator | BiEncoderCollator
    if args.student == "cross-encoder":
        model = load_cross_encoder(args.model, trained=False, num_layers=args.num_layers)
        collator = CrossEncoderCollator(*load_tokenizer(args.model, model, args.max_length))
    else:
        model = load_bi_encoder(
            args.model, num_layers=args.num_layers, pooling=args.pooling, similarity=args.similarity, scale=args.scale
        )
        collator = BiEncoderCollator(*load_tokenizer(args.model, model, args.max_length))
    return model, collator.tokenizer, collator


def _save(trainer: Any, output: Path) -> None:
    """Write the student into `output`, aside first, and `_LAST_FILE` last: without it no half of it can be loaded."""
    aside = output / "student.tmp"
    if trainer.is_world_process_zero():
        shutil.rmtree(aside, ignore_errors=True)
        (output / _LAST_FILE).unlink(missing_ok=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(aside))
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        files = [path for path in aside.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path == aside / _LAST_FILE):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            target = output / path.relative_to(aside)
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
        shutil.rmtree(aside)
