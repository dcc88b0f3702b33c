"""`pile-fast ensemble` from Parquet to Parquet: pairs per second, and the most memory it held.

python benchmarks/ensemble_file.py [--pairs 4e6 32e6] [--words 0 40] [--method pile]

Makes files of generated queries of 5 to 75 documents (40 on average) with query_id, doc_ids, labels, teachers and the
logits of 4 teachers, a tenth of them null, and for --words also a query of 8 words and documents of that many. Runs the
command on each in a process of its own and prints a line per file. Times are the whole command's, the start of Python and the
imports among them (the first line, of a file of one query, shows those). On a busy machine look at the processor seconds.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TEACHERS = 4
PAIRS_AT_ONCE = 200_000
COMMAND = """
import sys
from pile_fast.cli import main
code = main(sys.argv[1:])
with open("/proc/self/status") as file:
    print("peak", next(line.split()[1] for line in file if line.startswith("VmHWM")))
sys.exit(code)
"""


def lists(lengths: np.ndarray, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], lengths.cumsum()]).astype(np.int32)), values)


def texts(rng: np.random.Generator, count: int, words: int) -> pa.Array:
    vocabulary = pa.array([f"word{i}" for i in range(20_000)])
    chosen = vocabulary.take(pa.array(rng.zipf(1.3, count * words) % len(vocabulary)))
    return pa.compute.binary_join(lists(np.full(count, words), chosen), " ")


def make_table(rng: np.random.Generator, first: int, pairs: int, words: int) -> pa.Table:
    lengths = rng.integers(5, 76, size=max(1, pairs // 40))
    queries, documents = len(lengths), int(lengths.sum())
    logits = rng.standard_normal(documents * TEACHERS, dtype=np.float32)
    logits = pa.array(logits, mask=rng.random(documents * TEACHERS) < 0.1)
    columns = {
        "query_id": pa.array([f"q{first + q}" for q in range(queries)]),
        "doc_ids": lists(lengths, pa.array(np.char.add("D", rng.integers(0, 8_000_000, documents).astype(str)))),
        "labels": lists(lengths, pa.array(rng.integers(0, 5, documents).astype(np.float32))),
        "teacher_logits": lists(lengths, lists(np.full(documents, TEACHERS), logits)),
        "teachers": pa.array([[f"teacher {m}" for m in range(TEACHERS)]] * queries),
    }
    if words:
        columns |= {"query": texts(rng, queries, 8), "documents": lists(lengths, texts(rng, documents, words))}
    return pa.table(columns)


def make_file(path: Path, pairs: int, words: int) -> int:
    """Returns the number of pairs."""
    rng = np.random.default_rng(0)
    writer, queries, written = None, 0, 0
    while written < pairs:
        table = make_table(rng, queries, min(PAIRS_AT_ONCE, pairs - written), words)
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
        queries += table.num_rows
        written += len(table["labels"].combine_chunks().flatten())
    writer.close()
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=float, nargs="+", default=[4e6, 32e6])
    parser.add_argument("--words", type=int, nargs="+", default=[0, 40])
    parser.add_argument("--method", default="pile")
    parser.add_argument("--granularity", default="shared", help="of the method pile")
    args = parser.parse_args()
    print("| pairs | words a document | input MB | seconds | pairs/s | processor seconds | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.parquet"), Path(folder, "out.parquet")
        for pairs, words in [(1, 0), *((int(pairs), words) for words in args.words for pairs in args.pairs)]:
            count = make_file(source, pairs, words)
            arguments = ["ensemble", str(source), "--output", str(target), "--method", args.method]
            arguments += ["--granularity", args.granularity] if args.method == "pile" else []
            start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            result = subprocess.run([sys.executable, "-c", COMMAND, *arguments], check=True, capture_output=True, text=True)
            seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
            processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            if pq.read_metadata(target).num_rows != pq.read_metadata(source).num_rows:
                sys.exit("the output does not have the input's rows")
            peak = int(result.stdout.split()[-1]) / 1024
            size = os.path.getsize(source) / 1e6
            print(
                f"| {count:,} | {words} | {size:.0f} | {seconds:.2f} | {count / seconds:,.0f} | {processor:.2f} | {peak:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
