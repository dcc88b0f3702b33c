"""Public data sets by name, as rows: what `pile-fast convert --dataset` reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from pile_fast.data.locate import find_data

# Name of the data, and of its folder.
NAMED = {
    **{f"wikiqa-{split}": "wikiqa" for split in ("train", "dev", "test")},
    "cranfield": "cranfield",
    "mq2008": "mq2008",
    **{f"mq2008-S{part}": "mq2008" for part in range(1, 6)},
}


def read_named(name: str, data: str | Path | None = None) -> Iterable[dict]:
    """The rows of a public data set whose files are at hand.

    Args:
        name: one of `NAMED`: "wikiqa-train", "wikiqa-dev", "wikiqa-test" (`load_wikiqa`), "cranfield" (`load_cranfield`
            with 20 candidates by BM25), "mq2008" and its parts "mq2008-S1" .. "mq2008-S5" (`load_mq2008`).
        data: the folder that holds the data set's folder; None = see `find_data`.

    Raises:
        ValueError: no such name, or a broken line.
        FileNotFoundError: the files are not there; the message says which.
    """
    if name not in NAMED:
        raise ValueError(f"dataset: expected one of {', '.join(NAMED)}, got {name!r}")
    dataset = NAMED[name]
    folder = find_data(dataset, data)
    if folder is None:
        raise FileNotFoundError(f"{dataset}: not found in data/; say where its folder lies, by --data or PILE_FAST_DATA")
    part = name.removeprefix(dataset).removeprefix("-")
    if dataset == "wikiqa":
        from pile_fast.data.wikiqa import load_wikiqa

        return load_wikiqa(folder, part)
    if dataset == "cranfield":
        from pile_fast.data.cranfield import load_cranfield

        return load_cranfield(folder, k=20)
    from pile_fast.data.mq2008 import load_mq2008

    lists = load_mq2008(folder, missing="bottom")
    return (lists.part(part) if part else lists).rows()


def orders_a_pair(row: dict) -> bool:
    """Whether the row's labels say of any document that it is better than another."""
    return len({label for label in row["labels"] if label is not None}) > 1


def with_pairs(rows: Iterable[dict]) -> Iterator[dict]:
    """The rows whose labels order a pair."""
    return (row for row in rows if orders_a_pair(row))
