"""Fuzzes the readers: small files of every format, mutated, are read, or refused with file and place.

``make fuzz`` runs it for minutes, `tests/test_fuzz.py` for seconds. A file is made from (target, seed) alone, so what a run
finds is made again with ``python tests/fuzz.py --target NAME --seed N --files 1 --keep FOLDER``.

Each file is read with and without `bad_rows`. The only answers allowed are rows that pass `check_row` again unchanged, or a
`DataError` of one printable line that begins with the name of a file that was read and a place in it. Some files go through
``pile-fast convert`` as well, which must say the same by its exit code and one line. Everything runs in child processes
with a limit on memory, so that a crash of a library in C++, a hang or a greedy read is seen, too.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import gzip
import io
import json
import lzma
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

TOKENS = [
    *("nan", "NaN", "inf", "-inf", "Infinity", "1e999", "-1e999", "1e38", "1e39", "1e-400", "1_0", "1_000", "٣", "१२"),
    *("²", "½"),
    *("0x10", "+5", "-0", ".", "1.", ".5", "--1", "-", "5", "9007199254740993", "18446744073709551616", "9" * 400, "1" * 5000),
    *("", " ", "\t", "\n", "\r", "\r\n", "\x00", "\x0b", "\x1c", "\x85", "\u00a0", "\u2028", "\ufeff", "\x1b[31m", "\u202e"),
    *("é", "日本", "😀", "#", ":", "=", ",", "qid:", "qid:1", "1:1", "0:1", "99999:1", "100001:1", "999999999999:1", "docid ="),
    *("Q0", "null", "NULL", "None", "true", "false", "{}", "[]", "[[]]", "{", "}", "[", "]", '"', "\\", "\\ud800", "\\u0000"),
    *('"a"', "[null]", "[" * 500, "[" * 3000, '{"a":' * 3000, '"x": 1,', "labels", "score", "scores", "query_id"),
]
BYTES = [b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xc3", b"\xed\xa0\x80", b"\x00" * 20, b"\n\n\n", b"\x80"]
VALUES = [
    *(None, True, False, 0, -1, 5, 2**53 + 1, 2**64, 10**400, 0.5, 1e308, float("nan"), float("inf")),
    *("", "text", "\x1b[2J", "é\u2028", "\ud800", [], [None], [[]], [[None]], [1, "2"], ["a", "a"], {}, {"text": "t"}),
    *({"text": 5}, [{"text": "t", "docid": "d", "score": 1}]),
]

ROWS = [
    {
        "query_id": f"q{i}", "query": f"what is {i}", "documents": [f"text {i} {d}" for d in range(2 + i % 3)],
        "features": [[0.5 * d, float(i), -1.25] for d in range(2 + i % 3)], "doc_ids": [f"d{d}" for d in range(2 + i % 3)],
        "labels": [float(d % 3) for d in range(2 + i % 3)], "teacher_logits": [[0.5 + d, 3.0 - d] for d in range(2 + i % 3)],
        "teachers": ["bm25", "dense"],
    }
    for i in range(8)
]  # fmt: skip
RUN = [f"q{i} Q0 d{d} {d + 1} {9.5 - d} tag" for i in range(6) for d in range(3)]
RANKS = [f"q{i}\td{d}\t{d + 1}" for i in range(6) for d in range(3)]
QRELS = [f"q{i} 0 d{d} {d}" for i in range(6) for d in range(3)]
QUERIES = [f"q{i}\twhat is {i}" for i in range(6)]
DOCUMENTS = [f"d{d}\ttitle {d}\ttext {d}" for d in range(3)]
LETOR = [f"{d} qid:{i} 1:0.5 2:{d}.25 4:-3e-1 # docid = D{i}-{d} inc = 1" for i in range(5) for d in range(3)]
PLAIN_LETOR = ["1 1:0.5", "0 2:1", "2 1:3 4:1", "0 1:1", "1 3:0.125"]
BGE = [
    {"id": f"b{i}", "query": f"query {i}", "pos": ["a", "b"], "neg": ["c"], "pos_scores": [1.5, 2], "neg_scores": [0.25]}
    for i in range(6)
]
TEVATRON = [
    {
        "query_id": f"{i}",
        "query": f"query {i}",
        "positive_passages": [{"docid": "p", "title": "t", "text": "a", "score": 1}],
        "negative_passages": [{"docid": "n", "title": "", "text": "b", "score": 0.75}],
    }
    for i in range(4)
]
TEVATRON += [
    {
        "query_id": f"s{i}",
        "query": "x",
        "passages": [{"docid": "p", "text": "a"}, {"docid": "n", "text": "b"}],
        "scores": [1, 0.5],
    }
    for i in range(2)
]


def lines(content: list) -> bytes:
    return "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in content).encode()


def first_lines(name: str, count: int) -> bytes | None:
    """The first lines of a file of real data, where it is at hand."""
    folder = os.environ.get("PILE_FAST_DATA")
    for suffix, opener in (("", open), (".xz", lzma.open), (".gz", gzip.open)):
        path = Path(folder or "/nowhere", name + suffix)
        if path.is_file():
            with opener(path, "rb") as file:
                return b"".join(line for line, _ in zip(file, range(count), strict=False))
    return None


# -- targets: a name, the files by name (the first is the one read), options, and which files are mutated


class Target:
    def __init__(self, format: str, files: dict[str, bytes], options: dict[str, str] | None = None, mutated: str | None = None):
        self.format = format
        self.files = files
        self.options = options or {}
        self.mutated = mutated or next(iter(files))

    def read(self, folder: Path, bad_rows) -> int:
        from pile_fast.data import check_row, read_letor, read_rows

        path = folder / next(iter(self.files))
        options = {name: folder / file for name, file in self.options.items()}
        count = 0
        for row in read_rows(path, format=self.format, bad_rows=bad_rows, **options):
            if check_row(row) != row:
                raise AssertionError("a row is not what check_row makes of it")
            count += 1
        if self.format == "letor" and bad_rows is None:
            read_letor(path)
        return count


def json_targets() -> dict[str, Target]:
    array = json.dumps(ROWS, indent=1).encode()
    return {
        "jsonl": Target("jsonl", {"a.jsonl": lines(ROWS)}),
        "json-array": Target("jsonl", {"a.json": array}),
        "jsonl-gz": Target("jsonl", {"a.jsonl.gz": gzip.compress(lines(ROWS), mtime=0)}),
        "bge": Target("bge", {"a.jsonl": lines(BGE)}),
        "tevatron": Target("tevatron", {"a.jsonl": lines(TEVATRON)}),
    }


def text_targets() -> dict[str, Target]:
    trec = {"a.run": lines(RUN), "qrels": lines(QRELS), "queries.tsv": lines(QUERIES), "documents.tsv": lines(DOCUMENTS)}
    options = {"qrels": "qrels", "queries": "queries.tsv", "documents": "documents.tsv"}
    real_letor = first_lines("mq2008/S1.txt", 12) or lines(LETOR)
    real_qrels = first_lines("cranfield/qrels.txt", 20) or lines(QRELS)
    return {
        "letor": Target("letor", {"a.txt": lines(LETOR)}),
        "letor-real": Target("letor", {"a.txt": real_letor}),
        "letor-xz": Target("letor", {"a.txt.xz": lzma.compress(lines(LETOR))}),
        "letor-data-of-sizes": Target("letor", {"a.txt": lines(PLAIN_LETOR), "a.txt.query": b"2\n3\n"}),
        "letor-sizes": Target("letor", {"a.txt": lines(PLAIN_LETOR), "a.txt.group": b"2\n3\n"}, mutated="a.txt.group"),
        "run": Target("trec", {"a.run": lines(RUN)}),
        "run-ranks": Target("trec", {"a.run": lines(RANKS)}),
        "run-with-files": Target("trec", trec, options),
        "run-qrels": Target("trec", trec, options, mutated="qrels"),
        "run-queries": Target("trec", trec, options, mutated="queries.tsv"),
        "run-documents": Target("trec", trec, options, mutated="documents.tsv"),
        "qrels": Target("qrels", {"a.qrels": lines(QRELS)}),
        "qrels-real": Target("qrels", {"a.qrels": real_qrels}),
        "qrels-beir": Target(
            "qrels", {"a.qrels": lines(["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(5))])}
        ),
    }


def parquet_targets() -> dict[str, Target]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pile_fast.data.parquet import SCHEMA

    def content(table: pa.Table, **options) -> bytes:
        file = io.BytesIO()
        pq.write_table(table, file, **options)
        return file.getvalue()

    table = pa.Table.from_pylist(ROWS, SCHEMA)
    other = pa.table(
        {
            "query_id": pa.array(["a", "b", "c"]).dictionary_encode(),
            "labels": pa.array([[1, 2], [3, None], [0, 1]], pa.large_list(pa.int64())),
            "teachers": pa.array([["x"]] * 3, pa.list_(pa.large_string())),
            "teacher_logits": pa.array([[[1], [2]]] * 3, pa.list_(pa.list_(pa.float64(), 1))),
            "documents": pa.array([[b"a", b"b"]] * 3, pa.list_(pa.binary())),
            "extra": pa.array([{"x": 1}] * 3),
        }
    )
    return {
        "parquet": Target("parquet", {"a.parquet": content(table, compression="zstd", row_group_size=3)}),
        "parquet-plain": Target("parquet", {"a.parquet": content(table, compression="none", use_dictionary=False)}),
        "parquet-other-types": Target("parquet", {"a.parquet": content(other, compression="snappy", row_group_size=2)}),
        "parquet-v2": Target("parquet", {"a.parquet": content(other, data_page_version="2.0", compression="gzip")}),
    }


TARGETS: dict[str, Callable[[], dict[str, Target]]] = {"json": json_targets, "text": text_targets, "parquet": parquet_targets}


# -- mutations


def mutate(content: bytes, target: Target, random: random.Random) -> bytes:
    if target.format == "parquet":
        return mutate_binary(content, random, footer=random.random() < 0.7)
    if target.mutated.endswith((".gz", ".xz")):
        if random.random() < 0.3:
            return mutate_binary(content, random, footer=False)
        module = gzip if target.mutated.endswith(".gz") else lzma
        return module.compress(mutate_text(module.decompress(content), target, random))
    return mutate_text(content, target, random)


def mutate_binary(content: bytes, random: random.Random, footer: bool) -> bytes:
    data = bytearray(content)
    length = int.from_bytes(data[-8:-4], "little")
    start = max(0, len(data) - 8 - length) if footer else 0
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        if len(data) <= start + 1:
            break
        place = random.randrange(start, len(data))
        kind = random.randrange(8)
        if kind < 3:
            data[place] = random.randrange(256)
        elif kind == 3:
            data[place] ^= 1 << random.randrange(8)
        elif kind == 4:
            del data[place : place + random.randint(1, 8)]
        elif kind == 5:
            data[place:place] = random.randbytes(random.randint(1, 8))
        elif kind == 6:
            other = random.randrange(start, len(data))
            data[place : place + 8] = data[other : other + 8]
        elif random.random() < 0.2:
            del data[place:]
    return bytes(data)


def mutate_text(content: bytes, target: Target, random: random.Random) -> bytes:
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        kinds = [lines_changed, fields_changed, fields_changed, bytes_changed]
        if target.format in ("jsonl", "bge", "tevatron"):
            kinds += [values_changed] * 3
        content = random.choice(kinds)(content, random)
    return content


def bytes_changed(content: bytes, random: random.Random) -> bytes:
    data = bytearray(content)
    place = random.randrange(len(data) + 1)
    kind = random.randrange(5)
    if kind == 0 and place < len(data):
        data[place] = random.randrange(256)
    elif kind == 1:
        del data[place : place + random.choice((1, 2, 10, 1000))]
    elif kind == 2:
        del data[place:]
    elif kind == 3:
        data[place:place] = random.choice(BYTES)
    else:
        data[place:place] = random.choice(TOKENS).encode()
    return bytes(data)


def lines_changed(content: bytes, random: random.Random) -> bytes:
    parts = content.split(b"\n")
    here, there = random.randrange(len(parts)), random.randrange(len(parts))
    kind = random.randrange(8)
    if kind == 0:
        parts.insert(there, parts[here])
    elif kind == 1:
        del parts[here]
    elif kind == 2:
        parts[here], parts[there] = parts[there], parts[here]
    elif kind == 3:
        parts[here] = random.choice(TOKENS).encode()
    elif kind == 4:
        parts[here] = random.choice(BYTES) + parts[here]
    elif kind == 5:
        parts = parts[:here]
    elif kind == 6:
        return random.choice((b"\r\n", b"\r", b"\n\n", b"\x00\n")).join(parts)
    else:
        random.shuffle(parts)
    return b"\n".join(parts)


def fields_changed(content: bytes, random: random.Random) -> bytes:
    parts = content.split(b"\n")
    here = random.randrange(len(parts))
    fields = re.split(rb"([ \t:,\"\[\]{}=#]+)", parts[here])
    one, two = random.randrange(len(fields)), random.randrange(len(fields))
    kind = random.randrange(6)
    if kind < 3:
        fields[one] = random.choice(TOKENS).encode()
    elif kind == 3:
        del fields[one]
    elif kind == 4:
        fields[one], fields[two] = fields[two], fields[one]
    else:
        fields.insert(one, fields[two])
    parts[here] = b"".join(fields)
    return b"\n".join(parts)


def values_changed(content: bytes, random: random.Random) -> bytes:
    """Another value, no value, a new key or a repeated key somewhere in the object of a line, or of an array."""
    parts = content.split(b"\n")
    here = random.randrange(len(parts))
    whole = parts[0].strip() == b"["
    try:
        value = json.loads(content if whole else parts[here])
    except (ValueError, RecursionError):
        return fields_changed(content, random)
    place, holders = value, []
    while isinstance(place, (dict, list)) and place and (not holders or random.random() < 0.6):
        key = random.choice(list(place)) if isinstance(place, dict) else random.randrange(len(place))
        holders.append((place, key))
        place = place[key]
    if holders:
        holder, key = holders[-1]
        kind = random.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.append(holder[key])
        elif kind == 2 and isinstance(holder, dict):
            holder[random.choice(("scores", "score", "docid", "pos_scores", "teachers", "labels", "id"))] = random.choice(
                VALUES
            )
        else:
            holder[key] = random.choice(VALUES)
    changed = json.dumps(value, indent=1 if whole else None, ensure_ascii=random.random() < 0.5).encode(errors="surrogatepass")
    if whole:
        return changed
    parts[here] = changed
    return b"\n".join(parts)


# -- the rule


def allowed(error: Exception, folder: Path, target: Target) -> str | None:
    """What is wrong with an error; None if it is as it should be."""
    from pile_fast.data.rows import DataError

    if type(error) is not DataError:
        return f"{type(error).__name__} instead of DataError"
    text = str(error)
    if "\n" in text or not text.isprintable():
        return "not one printable line"
    name = next((name for name in sorted(target.files, key=len, reverse=True) if text.startswith(f"{folder / name}:")), None)
    if name is None:
        return "does not begin with the name of a file"
    rest = text.removeprefix(f"{folder / name}:")
    about_the_file = (
        r" (no rows|no judgements|judges |damaged file|column |missing column |counts more rows|the queries' sizes)"
    )
    if name.endswith("parquet"):
        place = r" row \d+: ."
    elif target.format == "qrels":
        place = r"(\d+: .| query )"
    else:
        place = r"\d+: ."
    return None if re.match(rf"{place}|{about_the_file}", rest) else "does not say where in the file"


def try_file(target: Target, seed: int, name: str, folder: Path) -> tuple[str, str | None]:
    """("read", "refused" or "neither", the reason of the last)."""
    from pile_fast.data import BadRows

    source = random.Random(f"{name} {seed}")
    for file, content in target.files.items():
        (folder / file).write_bytes(mutate(content, target, source) if file == target.mutated else content)
    answer = "read"
    for bad_rows in (None, BadRows()):
        try:
            target.read(folder, bad_rows)
        except Exception as error:  # this is what it looks for
            if reason := allowed(error, folder, target):
                return "neither", f"{reason}: {str(error)[:300]}\n{traceback.format_exc(limit=-3)[-1500:]}"
            answer = "refused"
        if bad_rows is None and seed % 16 == 0 and (reason := tried_command(target, folder, answer)):
            return "neither", reason
        if bad_rows is not None and any("\n" in reason or not reason.isprintable() for reason in bad_rows.reasons):
            return "neither", "a reason of bad_rows is not one printable line"
    return answer, None


def tried_command(target: Target, folder: Path, answer: str) -> str | None:
    """What is wrong with what ``pile-fast convert`` says of a file that the reader has read or refused."""
    from pile_fast.cli import main

    output = folder / "out" / "out.jsonl"
    output.parent.mkdir(exist_ok=True)
    output.unlink(missing_ok=True)
    options = [text for name, file in target.options.items() for text in (f"--{name}", str(folder / file))]
    arguments = ["convert", str(folder / next(iter(target.files))), "--from", target.format, "--output", str(output), *options]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
        code = main(arguments)
    text = told.getvalue()
    if code != (answer == "refused"):
        return f"convert: exit code {code} for a file that is {answer}: {text}"
    if code and not (text.startswith("pile-fast: error: ") and text.endswith("\n") and text[:-1].isprintable()):
        return f"convert: not one printable line: {text!r}"
    if (code == 0) != output.exists() or len(list(output.parent.iterdir())) > 1:
        return f"convert: exit code {code}, and there are {[path.name for path in output.parent.iterdir()]}"
    return None


# -- child processes


def child(group: str, names: list[str], start: int, stop: int, keep: str | None) -> None:
    """Tries files `start` .. `stop` of the targets in turn; a line of JSON for the start of each and for its answer."""
    limit = 6 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    targets = {name: target for name, target in TARGETS[group]().items() if not names or name in names}
    folder = (
        Path(keep) if keep else Path(tempfile.mkdtemp(prefix="fuzz", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    )
    for name in targets:  # a folder each: readers look for files beside
        (folder / name).mkdir(parents=True, exist_ok=True)
    try:
        for number in range(start, stop):
            name = list(targets)[number % len(targets)]
            print(json.dumps(["try", name, number]), flush=True)
            begin = time.monotonic()
            faulthandler.dump_traceback_later(60, exit=True)  # a file that takes this long hangs
            answer, reason = try_file(targets[name], number, name, folder / name)
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps([answer, name, number, round(time.monotonic() - begin, 2), reason]), flush=True)
    finally:
        if not keep:
            shutil.rmtree(folder)


def fuzz(
    group: str, start: int, count: int, names: list[str], keep: str | None = None
) -> tuple[collections.Counter, list[str]]:
    """Counts of the answers, and what was neither read nor refused; a child that dies is replaced."""
    counts: collections.Counter = collections.Counter()
    found = []
    stop = start + count
    while start < stop:
        arguments = [sys.executable, __file__, "--child", group, str(start), str(stop), keep or "", *names]
        errors = tempfile.TemporaryFile("w+")
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=errors, text=True)
        trying = None
        for line in process.stdout:
            answer, name, number, *rest = json.loads(line)
            if answer == "try":
                trying = (name, number)
                continue
            trying, start = None, number + 1
            counts[answer] += 1
            counts["slow"] += rest[0] > 5
            if answer == "neither":
                found.append(f"--target {name} --seed {number}: {rest[1]}")
        ended = process.wait()
        errors.seek(0)
        told = errors.read()
        if ended and trying is None:
            raise RuntimeError(f"the child failed by itself: {told[-2000:]}")
        if trying is not None:
            counts["neither"] += 1
            found.append(
                f"--target {trying[0]} --seed {trying[1]}: the process ended with {process.returncode}: {told[-1500:]}"
            )
            start = trying[1] + 1
    return counts, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=200_000, help="how many files (default: 200000)")
    parser.add_argument("--seed", type=int, default=0, help="the first file's number (default: 0)")
    parser.add_argument("--target", action="append", default=[], help="only this target")
    parser.add_argument("--keep", metavar="DIR", help="leave the last file of each target there")
    args = parser.parse_args()
    groups = {group: list(make()) for group, make in TARGETS.items()}
    wanted = {group: [name for name in names if not args.target or name in args.target] for group, names in groups.items()}
    total = sum(map(len, wanted.values()))
    if not total:
        parser.error(f"--target: expected some of {', '.join(name for names in groups.values() for name in names)}")
    counts: collections.Counter = collections.Counter()
    found = []
    for group, names in wanted.items():
        if not names:
            continue
        begin = time.monotonic()
        share = -(-args.files * len(names) // total)
        part, more = fuzz(group, args.seed, share, names, args.keep)
        print(f"{group}: {share:,} files in {time.monotonic() - begin:.0f} s: {dict(part)}", flush=True)
        counts += part
        found += more
    for text in found:
        print(text)
    answers = [f"{counts[name]:,} {name}" for name in ("read", "refused", "neither")]
    print(f"{sum(counts[name] for name in ('read', 'refused', 'neither')):,} files: {', '.join(answers)}")
    return bool(found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        group, start, stop, keep, *names = sys.argv[2:]
        child(group, names, int(start), int(stop), keep or None)
    else:
        sys.exit(main())
