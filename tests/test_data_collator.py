"""Rows in memory went through no reader: the collators check them and name the query (A5, B12, C4)."""

import math
from decimal import Decimal

import datasets
import numpy as np
import pytest
import torch

from pile_fast.data.collator import BiEncoderCollator, CrossEncoderCollator, FeatureCollator

ROW = {"query_id": "q7", "query": "red tree", "documents": ["a", "b"], "features": [[0.0, 1.0], [1.0, 0.0]],
       "labels": [2, 0], "teacher_logits": [[1.0, 0.0], [0.5, 0.2]], "teachers": ["good", "bad"]}  # fmt: skip


@pytest.fixture
def collators(tiny_tokenizer):
    return {
        "features": FeatureCollator(),
        "cross": CrossEncoderCollator(tiny_tokenizer),
        "bi": BiEncoderCollator(tiny_tokenizer),
    }


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("labels", [math.inf, 0], r"labels\[0\]: expected a finite number, or None = unlabelled, got inf"),
        ("labels", [0, -math.inf], r"labels\[1\]: expected a finite number, or None = unlabelled, got -inf"),
        ("labels", [2**60, 2**60 + 1], r"labels: expected whole numbers up to 2\^53, which can be told apart"),
        ("labels", torch.tensor([2**60, 0]), r"labels: expected whole numbers up to 2\^53"),
        ("labels", [10**400, 0], "labels: expected numbers, equally many per document"),
        ("labels", ["1", "0"], "labels: expected numbers, equally many per document: got '1'"),
        ("labels", ["1_000", 0], "labels: expected numbers, equally many per document: got '1_000'"),
        ("labels", [1j, 0], "labels: expected numbers, equally many per document"),
        ("labels", torch.tensor([1j, 0]), "labels: expected numbers, equally many per document"),
        ("labels", np.array(["2020-01-01", "2021-01-01"], "datetime64[D]"), "labels: expected numbers"),
        ("labels", 3, r"labels: expected 1 dimension\(s\), got \(\)"),
        ("teacher_logits", [[1.0, 2.0], [1.0]], "teacher_logits: expected numbers, equally many per document"),
        ("teacher_logits", [[1.0, 2.0], None], "teacher_logits: expected numbers, equally many per document"),
        ("teacher_logits", [[1.0, "x"], [1.0, 2.0]], "teacher_logits: expected numbers, equally many per document: got 'x'"),
        ("teachers", ["good"], r"teachers: expected a name of its own for each of the 2 teachers, got \['good'\]"),
        ("teachers", ["good", "good"], "teachers: expected a name of its own for each of the 2 teachers"),
    ],
)
def test_numbers_that_are_none(collators, column, value, message):
    for collator in collators.values():
        with pytest.raises(ValueError, match=rf"^query 'q7': {message}"):
            collator([ROW | {column: value}])


@pytest.mark.parametrize("kind", ["cross", "bi"])
@pytest.mark.parametrize(
    "column, value, message",
    [
        ("documents", ["a", None], r'documents\[1\]: expected a text, got None; write "" where there is none'),
        ("documents", [3, "b"], r"documents\[0\]: expected a text, got int 3"),
        ("documents", [b"a", "b"], r"documents\[0\]: expected a text, got bytes b'a'"),
        ("documents", ["a", ["b"]], r"documents\[1\]: expected a text, got list \['b'\]"),
        ("documents", "ab", "documents: expected a list with an entry per document, got str 'ab'"),
        ("documents", 5, "documents: expected a list with an entry per document, got int 5"),
        ("documents", ["a", "\ud800"], r"documents\[1\]: not Unicode: surrogates not allowed at character 1"),
        ("documents", None, "no 'documents', which this student needs; the row has .*remove_unused_columns=False"),
        ("query", None, "no 'query', which this student needs"),
        ("query", 3.5, "query: expected a text, got float 3.5"),
        ("query", ["red"], r"query: expected a text, got list \['red'\]"),
    ],
)
def test_texts_that_are_none(collators, kind, column, value, message):
    with pytest.raises(ValueError, match=rf"^query 'q7': {message}"):
        collators[kind]([ROW | {column: value}])


def test_rows_that_are_no_rows(collators):
    for row, given in (
        (datasets.Dataset.from_list([ROW]).with_format("pandas")[0], "DataFrame"),
        ("q7", "str"),
        ([ROW], "list"),
    ):
        with pytest.raises(ValueError, match=rf"expected rows as dicts of columns, got {given}; .*with_format\(None\)"):
            collators["features"]([row])


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        if isinstance(one[name], torch.Tensor):
            assert one[name].dtype == other[name].dtype and one[name].equal(other[name]) or one[name].isnan().any(), name
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, equal_nan=True)
        elif name == "labels":
            same(one[name], other[name])
        else:
            assert one[name] == other[name]


@pytest.mark.parametrize("kind", ["features", "cross", "bi"])
@pytest.mark.parametrize("format", ["numpy", "torch"])
def test_a_dataset_s_format_changes_nothing(collators, kind, format):
    other = ROW | {"query_id": "q8", "documents": ["a", "b", "a"], "features": [[1.0, 2.0]] * 3, "labels": [1, None, 0],
                   "teacher_logits": [[1.0, None], [2.0, 0.0], [3.0, 1.0]]}  # fmt: skip
    rows = datasets.Dataset.from_list([ROW, other])
    same(collators[kind]([rows[0], rows[1]]), collators[kind]([rows.with_format(format)[i] for i in range(2)]))


@pytest.mark.parametrize(
    "labels",
    [np.array([2, 0], np.uint64), [Decimal(2), 0], (2.0, 0), torch.tensor([2, 0], dtype=torch.bfloat16), [np.int8(2), None]],
)
def test_numbers_of_any_kind(collators, labels):
    packed = collators["features"]([ROW | {"labels": labels, "features": [torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])]}])
    assert packed["labels"]["labels"].tolist()[0] == 2.0 and packed["labels"]["labels"].dtype == torch.float32


# float32 would tie these two.
def test_large_labels_keep_their_order(collators):
    labels = collators["features"]([ROW | {"labels": [20000001, 20000000]}])["labels"]["labels"]
    assert labels[0] > labels[1]


def test_negated_view_is_read_with_its_sign(collators):
    negative = torch.complex(torch.ones(2, 2), torch.ones(2, 2)).conj().imag  # its memory says 1
    assert negative.is_neg() and collators["features"]([ROW | {"features": negative}])["features"].tolist() == [[-1.0] * 2] * 2


def test_teachers_are_matched_by_name(collators):
    swapped = ROW | {"query_id": "q8", "teacher_logits": [[0.0, 1.0], [0.2, 0.5]], "teachers": ["bad", "good"]}
    targets = collators["features"]([ROW, swapped])["labels"]
    assert targets["teachers"] == ["good", "bad"] and targets["teacher_logits"][:2].equal(targets["teacher_logits"][2:])
    with pytest.raises(ValueError, match="query 'q8': teachers: no 'bad', which query 'q7' has; got 'good', 'ugly'"):
        collators["features"]([ROW, swapped | {"teachers": ["good", "ugly"]}])


def test_infinite_teacher_logits_are_missing_and_told(collators):
    targets = collators["features"]([ROW, ROW | {"query_id": "q8", "teacher_logits": [[1.0, -math.inf], [math.inf, 1.0]]}])[
        "labels"
    ]
    assert targets["teacher_logits"].isnan().tolist() == [[False] * 2] * 2 + [[False, True], [True, False]]
    assert targets["infinite"] == "teacher 'bad' gives document 1 of query 'q8'"


def test_names_of_rows(collators):
    row = ROW | {"labels": [math.inf, 0], "query": "long " * 30}
    del row["query_id"]
    with pytest.raises(ValueError, match=r"^query 'long long .*\.\.\.': labels"):
        collators["features"]([row])
    del row["query"]
    with pytest.raises(ValueError, match=r"^query 2 of the batch: labels"):
        collators["features"]([ROW, row])
