"""WikiQA and Cranfield: small files with the real ones' layout, and the real ones where they are."""

import pytest

from pile_fast.data.cranfield import load_cranfield
from pile_fast.data.wikiqa import load_wikiqa


@pytest.fixture
def small_wikiqa(tmp_path):
    folder = tmp_path / "wikiqa"
    (folder / "emnlp-table").mkdir(parents=True)
    (folder / "WikiQA-dev.txt").write_text('who ?\tme "quoted\t1\nwho ?\tyou\t0\nwhere ?\there\t0\n')
    (folder / "WikiQA-dev.ref").write_text("1 0 0 1\n1 0 1 0\n7 0 0 0\n")
    for name, scores in (("CNN", (0.5, 0.25, 1e-3)), ("CNN-Cnt", (2, 1, 0))):
        lines = [f"{key} 0 {score} 0\n" for key, score in zip(("1 0 0", "1 0 1", "7 0 0"), scores, strict=True)]
        (folder / f"emnlp-table/WikiQA.{name}.dev.rank").write_text("".join(lines))
    return tmp_path


def test_wikiqa_rows(small_wikiqa):
    assert load_wikiqa(small_wikiqa, "dev") == [
        {
            "query_id": "1", "query": "who ?", "documents": ['me "quoted', "you"], "doc_ids": ["1-0", "1-1"],
            "labels": [1.0, 0.0], "teachers": ["CNN", "CNN-Cnt"], "teacher_logits": [[0.5, 2.0], [0.25, 1.0]],
        },
        {
            "query_id": "7", "query": "where ?", "documents": ["here"], "doc_ids": ["7-0"],
            "labels": [0.0], "teachers": ["CNN", "CNN-Cnt"], "teacher_logits": [[1e-3, 0.0]],
        },
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("WikiQA-dev.txt", "who ?\tme\n", r"dev\.txt:1: expected 3 cells, got 2"),
        ("WikiQA-dev.ref", "1 0 0 1\n", r"dev\.ref: expected 3 lines as in .*dev\.txt, got 1"),
        ("WikiQA-dev.ref", "1 0 0 1\n1 0 1 1\n7 0 0 0\n", r"dev\.ref:2: does not match the line in .*dev\.txt"),
        ("WikiQA-dev.ref", "1 0 0 1\n1 0 1 0\n1 0 2 0\n", r"dev\.ref:3: does not match"),
        (
            "emnlp-table/WikiQA.CNN.dev.rank",
            "1 0 0 0 1 0\n1 0 9 0 1 0\n7 0 0 0 1 0\n",
            r"CNN\.dev\.rank:2: does not match the line in .*dev\.ref",
        ),
        (
            "emnlp-table/WikiQA.CNN-Cnt.dev.rank",
            "1 0 0 0 1 0\n1 0 1 0 high 0\n7 0 0 0 1 0\n",
            r"CNN-Cnt\.dev\.rank:2: score: expected a number, got 'high'",
        ),
    ],
)
def test_wikiqa_broken_file_names_the_line(small_wikiqa, name, content, message):
    (small_wikiqa / "wikiqa" / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_wikiqa(small_wikiqa, "dev")


def test_wikiqa_missing_file_and_unknown_split(small_wikiqa):
    with pytest.raises(FileNotFoundError, match=r"WikiQA-test\.txt: no such file"):
        load_wikiqa(small_wikiqa, "test")
    with pytest.raises(ValueError, match="split: expected one of train, dev, test, got 'eval'"):
        load_wikiqa(small_wikiqa, "eval")


@pytest.mark.parametrize(
    "split, questions, answered, pairs, answers",
    [("train", 2_118, 873, 20_360, 1_040), ("dev", 296, 126, 2_733, 140), ("test", 633, 243, 6_165, 293)],
)
def test_wikiqa_has_the_documented_size(text_data_folder, split, questions, answered, pairs, answers):
    rows = load_wikiqa(text_data_folder("wikiqa"), split)
    assert len(rows) == len({row["query_id"] for row in rows}) == questions
    assert sum(max(row["labels"]) > 0 for row in rows) == answered
    assert sum(len(row["documents"]) for row in rows) == pairs
    assert sum(sum(row["labels"]) for row in rows) == answers
    assert ("teacher_logits" in rows[0]) == (split != "train")


@pytest.fixture
def small_cranfield(tmp_path):
    folder = tmp_path / "cranfield"
    folder.mkdir()
    (folder / "docs.tsv").write_text("1\tt\twing flow\n2\tt\theat flow\n3\t\t\n4\tt\tshock\n5\tt\twing wing\n")
    (folder / "queries.tsv").write_text("1\twing\n2\theat\n")
    (folder / "qrels.txt").write_text("1 0 4 3\n1 0 5 2\n2 0 3 1\n")
    return tmp_path


@pytest.mark.parametrize(
    "k, first, second", [(2, ["1", "4", "5"], ["1", "2"]), (0, ["4", "5"], []), (99, [*"1245"], [*"1245"])]
)
def test_cranfield_candidates_are_bm25s_best_and_the_judged_in_file_order(small_cranfield, k, first, second):
    rows = load_cranfield(small_cranfield, k=k)
    assert [row["doc_ids"] for row in rows] == [first, second]
    grades = {"4": 3.0, "5": 2.0}
    assert rows[0]["labels"] == [grades.get(doc_id, 0.0) for doc_id in first]
    assert rows[0]["query"] == "wing" and rows[0]["documents"][-1] == "wing wing"


def test_cranfield_errors(small_cranfield):
    (small_cranfield / "cranfield/qrels.txt").write_text("1 0 4 3\n1 0 9 3\n")
    with pytest.raises(ValueError, match=r"qrels\.txt:2: expected 'query 0 document grade' of known ones"):
        load_cranfield(small_cranfield)
    with pytest.raises(ValueError, match="k: expected an int >= 0, got -1"):
        load_cranfield(small_cranfield, k=-1)


def test_cranfield_has_the_documented_size(text_data_folder):
    rows = load_cranfield(text_data_folder("cranfield"), k=50)
    labels = [label for row in rows for label in row["labels"]]
    # One judged abstract is empty, so 1,836 of the 1,837 judgements are left.
    assert len(rows) == 225 and [labels.count(grade) for grade in (4, 3, 2, 1)] == [353, 387, 733, 363]
    assert all(50 <= len(row["documents"]) < 100 for row in rows)
