"""The text part of the quality benchmark: students of three MiniLM layers on WikiQA, of three teachers, several seeds each.

python benchmarks/quality_text.py runs/text [--seeds N] [--processes N]

Needs the scored files of docs/text.md (`make text`) and that page's variable MINILM. Cranfield, on which nothing is trained,
shows what carries over. What a finished student scores is kept in FOLDER/quality/, so the command resumes. Writes
results/quality/text.jsonl, lines like those of quality.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from _timing import where
from quality import MRR_AND_MAP, RESULTS, quality_of
from torch import Tensor
from tqdm import tqdm

from pile_fast.data import read_rows
from pile_fast.students import load_ranker

TEACHERS = ("bm25", "cosine", "fine-tuned")
SETS = {"WikiQA": ("test-scored.parquet", 64), "Cranfield": ("cranfield-scored.parquet", 128)}  # file, tokens
# Options of `pile-fast train`, as docs/text.md has them but for the seed.
TRAINING = (
    "--student cross-encoder --num-layers 3 --max-length 64 --num-train-epochs 1 --per-device-train-batch-size 4 "
    "--learning-rate 1e-4 --warmup-steps 20 --save-strategy no --report-to none --disable-tqdm true"
).split()


# Options that make each method's student.
METHODS = {
    "labels": ["--alpha", "0"],
    "mean": ["--iterations", "0"],
    "PILE, shared": ["--granularity", "shared"],
    "PILE, document": ["--granularity", "document"],
    "PILE, query": ["--granularity", "query"],
}


def packed(rows: list[dict]) -> tuple[Tensor, Tensor]:
    """Labels (D,) and cu_seqlens (Q + 1,)."""
    labels = torch.cat([torch.from_numpy(np.array(row["labels"], dtype=np.float32)) for row in rows])  # None becomes NaN
    return labels, torch.tensor([0] + [len(row["labels"]) for row in rows]).cumsum(0)


def student(folder: Path, options: list[str], seed: int, path: Path) -> None:
    """Train one, write what it scores on every set to `path`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as model:
        files = [folder / "train-scored.parquet", "--validation", folder / "dev-scored.parquet", "--output-dir", model]
        command = [Path(sys.executable).with_name("pile-fast"), "train", *files, "--teacher-columns", *TEACHERS]
        command += ["--model", os.environ["MINILM"], *TRAINING, "--seed", str(seed), *options]
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{path.stem}: {done.stderr.strip()[-2000:]}")
        scores = {}
        for name, (file, tokens) in SETS.items():
            rows = list(read_rows(folder / file))
            scores[name] = torch.cat(load_ranker(model, max_length=tokens).score(rows)).tolist()
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(scores))
    aside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the output folder of docs/text.md, e.g. runs/text")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="of one thread each (default: %(default)s)")
    args = parser.parse_args()
    if missing := [str(f) for f, _ in SETS.values() if not (args.folder / f).is_file()]:
        parser.error(f"{args.folder} lacks {', '.join(missing)}: run `make text` first")
    if "MINILM" not in os.environ:
        parser.error("MINILM: expected the model's folder in this environment variable, as docs/text.md sets it")
    torch.set_num_threads(1)
    kept = args.folder / "quality"
    kept.mkdir(exist_ok=True)
    paths = {(name, seed): kept / f"{name}, seed {seed}.json" for seed in range(args.seeds) for name in METHODS}
    todo = [(args.folder, METHODS[name], seed, path) for (name, seed), path in paths.items() if not path.is_file()]
    with ThreadPoolExecutor(args.processes) as pool:
        futures = [pool.submit(student, *task) for task in todo]
        try:
            for future in tqdm(as_completed(futures), desc="students", total=len(futures), unit="student"):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    records, here = [], where(1)
    for data, (file, _) in SETS.items():
        labels, cu_seqlens = packed(list(read_rows(args.folder / file)))
        for name, options in METHODS.items():
            scores = [json.loads(paths[name, seed].read_text())[data] for seed in range(args.seeds)]
            found = quality_of(labels, cu_seqlens, torch.tensor(scores), MRR_AND_MAP)
            unit = {"phase": "text", "data": data, "fold": 0, "method": name, "options": options, "where": here}
            records.append(unit | {"seeds": list(range(args.seeds))} | found)
    lines = [json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n" for record in records]
    (RESULTS / "text.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
