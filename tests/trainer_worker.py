"""Steps of students, on one process (`steps`) or, as a script under torchrun, on several."""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments

from pile_fast import PILELoss
from pile_fast.data.collator import BiEncoderCollator, CrossEncoderCollator
from pile_fast.students import load_ranker
from pile_fast.trainer import PileTrainer, pile_compute_loss_func

LOSS = {"alpha": 0.5, "backend": "torch"}
# State of the loss of the last `steps`.
LEARNED: list[dict] = []


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def trainer(
    folder, kind, *, own=False, passes=None, evaluation=None, callbacks=None, log=True, spoil=None, stream=False, **arguments
):
    """A Trainer of the student in folder/kind on folder/rows.json: ours, or transformers' own with our loss function.

    evaluation=True evaluates on the training rows; spoil="features" makes those of query q5 NaN, "gradient" the gradients of
    the second process; stream=True has the rows read as they come.
    """
    arguments = {
        "optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 2,
        "save_strategy": "no", "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "per_device_train_batch_size": 8, "output_dir": folder / "out", "remove_unused_columns": False,
    } | arguments  # fmt: skip
    model = load_ranker(folder / kind, device="cpu").model
    tokenizer = None if kind == "features" else AutoTokenizer.from_pretrained(folder / kind)
    rows = json.loads((folder / "rows.json").read_text())
    if spoil == "features":
        rows[5]["features"][0][0] = float("nan")
    if spoil == "gradient" and torch.distributed.get_rank() == 1:
        model.layers[0].weight.register_hook(lambda gradient: gradient * float("nan"))
    rows = Stream(rows) if stream else rows
    common = {"train_dataset": rows, "eval_dataset": rows if evaluation is True else evaluation, "callbacks": callbacks}
    if own:
        collator = (BiEncoderCollator if kind == "bi-encoder" else CrossEncoderCollator)(tokenizer)
        loss = pile_compute_loss_func(**LOSS)
        loss.loss.fit([collator(rows)], sharded=False)
        return Trainer(model, TrainingArguments(**arguments), collator, compute_loss_func=loss, **common)
    return PileTrainer(
        model, TrainingArguments(**arguments), loss=PILELoss(reduction="none", **LOSS), processing_class=tokenizer,
        max_documents_per_batch=passes, log_components=log, **common,
    )  # fmt: skip


def steps(*args, **kwargs):
    """(weights after training, logged losses, metrics if there is an evaluation set)."""
    run = trainer(*args, **kwargs)
    run.train()
    if isinstance(run, PileTrainer):
        LEARNED[:] = [run.loss.state_dict()]
    return (
        torch.cat([p.detach().flatten() for p in run.model.parameters()]),
        [entry["loss"] for entry in run.state.log_history if "loss" in entry],
        run.evaluate() if run.eval_dataset is not None else None,
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results, learned = {}, {}
    for name, case in json.loads(sys.argv[2]).items():
        try:
            results[name] = steps(folder, **case)
            learned[name] = LEARNED[0]
        except FloatingPointError as error:
            results[name] = str(error)
    torch.save(learned, folder / f"learned{torch.distributed.get_rank()}.pt")
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads race the interpreter's exit
