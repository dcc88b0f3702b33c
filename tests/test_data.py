import gzip
import lzma
import os
from pathlib import Path

import pytest
import torch

from pile_fast.data import RankedLists, find_data, load_mq2008, make_synthetic, pack_queries, read_letor
from pile_fast.data.mq2008 import HIGH_COVERAGE_SYSTEMS, SYSTEMS, UNCLEAR_SYSTEMS

LINES = """\
# a comment line, then an empty one

2 qid:a 1:0.5 2:1 4:-3e-1 # docid = D1 inc = 1 prob = 0.2
0 qid:a 2:2 #docid=D2
1 qid:b 1:7 4:0
"""


@pytest.fixture(scope="session")
def mq2008(mq2008_folder):
    return load_mq2008(mq2008_folder)


# -- LETOR text


@pytest.mark.parametrize("suffix, opener", [(".txt", open), (".txt.xz", lzma.open), (".txt.gz", gzip.open)])
def test_letor_reads_rows_queries_and_names(tmp_path, suffix, opener):
    path = tmp_path / f"S3{suffix}"
    with opener(path, "wt") as file:
        file.write(LINES)
    lists = read_letor(path)
    assert lists.features.tolist() == [[0.5, 1, 0, pytest.approx(-0.3)], [0, 2, 0, 0], [7, 0, 0, 0]]
    assert lists.labels.tolist() == [2, 0, 1]
    assert lists.cu_seqlens.tolist() == [0, 2, 3]
    assert lists.query_ids == ("a", "b")
    assert lists.doc_ids == ("D1", "D2", "b.1")  # a document without a name is numbered within its query
    assert lists.parts == ("S3", "S3")
    assert lists.teacher_logits.shape == (3, 0)


def test_letor_joins_files_and_keeps_their_names_as_parts(tmp_path):
    (tmp_path / "S1.txt").write_text("1 qid:1 1:1\n")
    (tmp_path / "S2.txt").write_text("0 qid:2 3:1\n0 qid:2 1:1\n")
    lists = read_letor(tmp_path / "S1.txt", tmp_path / "S2.txt", num_features=5)
    assert lists.parts == ("S1", "S2") and lists.cu_seqlens.tolist() == [0, 1, 3] and lists.features.shape == (3, 5)


@pytest.mark.parametrize(
    "line, reason",
    [
        ("1 1:0.5", "expected 'label qid:Q 1:v ...', got '1 1:0.5'"),
        ("1", "expected 'label qid:Q 1:v ...', got '1'"),
        ("1 qid: 1:0.5", "expected 'label qid:Q 1:v ...'"),
        ("high qid:a 1:0.5", "label: expected a number, got 'high'"),
        ("1 qid:a 1:0.5 2", "expected a feature 'index:value', got '2'"),
        ("1 qid:a 1:0.5 2:", "expected a feature 'index:value', got '2:'"),
        ("1 qid:a 1:0.5:2", "feature 1: expected a number, got '0.5:2'"),
        ("1 qid:a x:0.5", "feature index: expected a whole number, got 'x'"),
        ("1 qid:a 0:0.5", "feature indices must be 1 or more and increase, got 0 after 0"),
        ("1 qid:a 2:1 2:1", "feature indices must be 1 or more and increase, got 2 after 2"),
        ("1 qid:a 5:1", "feature index: expected at most 4, got 5"),
        ("1 qid:a 1:nan", "feature 1: expected a number that is finite in float32, got 'nan'"),
        ("1 qid:a 1:1e300", "feature 1: expected a number that is finite in float32, got '1e300'"),
        ("inf qid:a 1:1", "label: expected a number that is finite in float32, got 'inf'"),
        ("1 qid:b 1:1", "query 'b' appeared before; the rows of a query must stand together"),
    ],
)
def test_letor_broken_line_names_file_line_and_reason(tmp_path, line, reason):
    path = tmp_path / "broken.txt"
    path.write_text(f"0 qid:b 1:1\n0 qid:a 1:1\n{line}\n0 qid:a 1:1\n")
    with pytest.raises(ValueError) as caught:
        read_letor(path, num_features=4)
    assert str(caught.value).startswith(f"{path}:3: {reason}")


@pytest.mark.parametrize("name", ["cut.txt.xz", "cut.txt.gz", "junk.txt.xz", "junk.txt.gz", "latin.txt"])
def test_letor_damaged_file_is_named(tmp_path, name):
    whole = (lzma if name.endswith("xz") else gzip).compress("".join(f"1 qid:{i} 1:{i}\n" for i in range(2000)).encode())
    kind = name.split(".")[0]
    (tmp_path / name).write_bytes({"cut": whole[:-30], "junk": b"not it", "latin": b"1 qid:1 1:1 # caf\xe9\n"}[kind])
    with pytest.raises(ValueError, match=f"{name}:1: not UTF-8" if kind == "latin" else f"{name}: damaged file after line"):
        read_letor(tmp_path / name)


def test_letor_without_rows(tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="empty.txt: no rows"):
        read_letor(tmp_path / "empty.txt")


# -- RankedLists and the collator


def test_rows_select_and_collate_agree():
    lists = make_synthetic(12, documents=(1, 6))
    queries = [7, 0, 3]
    chosen, packed = lists.select(queries), pack_queries([lists[q] for q in queries])
    assert chosen.query_ids == ("q7", "q0", "q3")
    assert chosen.doc_ids[0] == "q7.0" and len(chosen.doc_ids) == len(chosen.labels)
    for name in ("features", "labels", "teacher_logits", "cu_seqlens"):
        torch.testing.assert_close(packed[name], getattr(chosen, name), equal_nan=True, rtol=0, atol=0)
    assert len(list(lists)) == len(lists) == 12
    torch.testing.assert_close(lists[-1]["labels"], lists[11]["labels"])


def test_folds_rotate_the_parts_and_share_no_query():
    lists = make_synthetic(50, documents=(1, 3))
    wanted = ["S1S2S3/S4/S5", "S2S3S4/S5/S1", "S3S4S5/S1/S2", "S4S5S1/S2/S3", "S5S1S2/S3/S4"]
    for number, parts in enumerate(wanted, 1):
        fold = lists.fold(number)
        assert [set(part.parts) for part in fold] == [{p[i : i + 2] for i in range(0, len(p), 2)} for p in parts.split("/")]
        assert sum(len(part) for part in fold) == len({q for part in fold for q in part.query_ids}) == 50


def test_lists_errors_name_the_argument():
    lists = make_synthetic(5)
    with pytest.raises(ValueError, match="fold: expected 1 to 5, got 6"):
        lists.fold(6)
    with pytest.raises(ValueError, match=r"part: expected some of .*'S1'.*got \['S9'\]"):
        lists.part("S1", "S9")
    with pytest.raises(ValueError, match="teacher_logits: expected"):
        lists.with_teachers(torch.zeros(3), ["one"])
    with pytest.raises(IndexError):
        lists[5]


def test_an_ensemble_can_take_the_teachers_place():
    lists = make_synthetic(5)
    fixed = lists.with_teachers(lists.teacher_logits.nanmean(1), ["mean"])
    assert isinstance(fixed, RankedLists) and fixed[0]["teacher_logits"].shape[1] == 1 and fixed.teacher_names == ("mean",)


# -- the generator


def test_generator_is_deterministic_and_seeded():
    one, two, other = make_synthetic(30, seed=3), make_synthetic(30, seed=3), make_synthetic(30, seed=4)
    for name in ("features", "labels", "teacher_logits", "cu_seqlens"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), equal_nan=True, rtol=0, atol=0)
    assert not torch.equal(one.labels, other.labels)


def test_generated_teachers_differ_in_scale_quality_and_coverage():
    from pile_fast.evaluation.metrics import ndcg

    lists = make_synthetic(200, documents=(2, 30))
    assert set(lists.labels.tolist()) == {0, 1, 2, 3, 4}
    assert 2 <= lists.cu_seqlens.diff().min() and lists.cu_seqlens.diff().max() <= 30
    teachers = lists.teacher_logits
    missing = teachers.isnan().float().mean(0)
    assert missing.min() == 0 and missing.max() > 0.3
    spread = torch.stack([t[~t.isnan()].std() for t in teachers.unbind(1)])
    assert spread.max() / spread.min() > 100
    quality = [ndcg(t.nan_to_num(-1e9), lists.labels, cu_seqlens=lists.cu_seqlens, k=10) for t in teachers.unbind(1)]
    assert quality[0] == max(quality) and quality[-1] == min(quality) and quality[0] - quality[-1] > 0.2


def test_generator_refuses_impossible_sizes():
    with pytest.raises(ValueError, match=r"got 5, \(9, 3\), 20"):
        make_synthetic(5, documents=(9, 3))


# -- where the data lies


def test_data_folder_explicit_then_environment_then_working_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("PILE_FAST_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("explicit", "environment"):
        (tmp_path / name).mkdir()
    assert find_data("no_such_set") is None
    (tmp_path / "data" / "no_such_set").mkdir(parents=True)
    assert find_data("no_such_set") == Path("data")
    monkeypatch.setenv("PILE_FAST_DATA", str(tmp_path / "environment"))
    assert find_data("no_such_set") == tmp_path / "environment"
    assert find_data("no_such_set", tmp_path / "explicit") == tmp_path / "explicit"
    with pytest.raises(FileNotFoundError, match="data folder .*nowhere does not exist"):
        find_data("no_such_set", tmp_path / "nowhere")
    monkeypatch.setenv("PILE_FAST_DATA", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match=r"gone \(from PILE_FAST_DATA\) does not exist"):
        find_data("no_such_set")


# -- MQ2008


@pytest.fixture
def small_mq2008(tmp_path):
    """Five parts of one query of two documents each, in MQ2008's files."""
    header = ",".join(["qid,docid,split,label", *(f"t{s}" for s in SYSTEMS)])
    rows = []
    (tmp_path / "mq2008").mkdir()
    (tmp_path / "mq2008_agg").mkdir()
    for i in range(1, 6):
        (tmp_path / f"mq2008/S{i}.txt").write_text(f"1 qid:{i} 46:1 #docid = A{i}\n0 qid:{i} 1:1 #docid = B{i}\n")
        rows += [
            f"{i},A{i},S{i},1," + ",".join(["8", "4", *[""] * 23]),
            f"{i},B{i},S{i},0," + ",".join(["2", *[""] * 24]),
        ]
    (tmp_path / "mq2008_agg/mq2008_teachers.csv").write_text("\n".join([header, *rows]) + "\n")
    return tmp_path


@pytest.mark.parametrize("missing, second", [("nan", torch.nan), ("bottom", 0.0)])
def test_mq2008_teachers_are_scaled_per_query_and_missing_is_read_as_asked(small_mq2008, missing, second):
    lists = load_mq2008(small_mq2008, systems=[1, 2, 3], missing=missing)
    assert lists.teacher_names == ("system 1", "system 2", "system 3")
    # System 3 returned nothing for the query: that says nothing about its documents, however missing is read.
    wanted = torch.tensor([[1.0, 1.0, torch.nan], [0.25, second, torch.nan]])
    torch.testing.assert_close(lists[2]["teacher_logits"], wanted, equal_nan=True)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda rows: rows[:3] + ["4,A4"] + rows[4:], r"csv:4: expected 29 cells, got 2"),
        (lambda rows: rows[:-1], r"csv: expected 10 rows as in the feature files, got 9"),
        (lambda rows: rows + rows[-1:], r"csv:12: expected 10 rows as in the feature files, got more"),
        (
            lambda rows: [rows[0], rows[2], rows[1]] + rows[3:],
            r"csv:2: expected 1,A1,S1,1 as in the feature files, got 1,B1,S1,0",
        ),
        (
            lambda rows: rows[:2] + [rows[2].replace(",2,", ",two,")] + rows[3:],
            r"csv:3: t1: expected a number, got 'two'",
        ),
        (lambda rows: rows[1:], r"csv:1: expected the header qid,docid,split,label,t1,"),
    ],
)
def test_mq2008_broken_teachers_name_the_line(small_mq2008, edit, message):
    path = small_mq2008 / "mq2008_agg/mq2008_teachers.csv"
    path.write_text("\n".join(edit(path.read_text().splitlines())) + "\n")
    with pytest.raises(ValueError, match=message):
        load_mq2008(small_mq2008)


@pytest.mark.parametrize("name", ["mq2008/S4.txt", "mq2008_agg/mq2008_teachers.csv"])
def test_mq2008_missing_file_is_named(small_mq2008, name):
    os.remove(small_mq2008 / name)
    with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
        load_mq2008(small_mq2008)


def test_mq2008_arguments_are_checked_before_files_are_read(tmp_path):
    with pytest.raises(ValueError, match="systems: expected numbers from 1 to 25, got"):
        load_mq2008(tmp_path, systems=[0, 3])
    with pytest.raises(ValueError, match="missing: expected 'nan' or 'bottom', got 'zero'"):
        load_mq2008(tmp_path, missing="zero")


def test_mq2008_has_the_documented_size(mq2008):
    assert len(mq2008) == 784 and mq2008.features.shape == (15_211, 46)
    assert [int((mq2008.labels == grade).sum()) for grade in range(3)] == [12_279, 2_001, 931]
    lengths = mq2008.cu_seqlens.diff()
    assert (lengths.min(), lengths.median(), lengths.max()) == (5, 8, 121)
    assert sum(bool((row["labels"] > 0).any()) for row in mq2008) == 564
    assert mq2008.features.min() == 0 and mq2008.features.max() == 1
    assert len(mq2008.teacher_names) == 23 and not {f"system {s}" for s in UNCLEAR_SYSTEMS} & set(mq2008.teacher_names)


def test_mq2008_fold_1_has_the_documented_rows(mq2008):
    train, validation, test = mq2008.fold(1)
    assert [len(part.labels) for part in (train, validation, test)] == [9_630, 2_707, 2_874]
    assert [len(part) for part in (train, validation, test)] == [471, 157, 156]


def test_mq2008_all_systems_have_the_documented_coverage(mq2008_folder):
    returned = ~load_mq2008(mq2008_folder, systems=SYSTEMS).teacher_logits.isnan()
    per_document, per_system = returned.sum(1), returned.sum(0)
    assert int(returned.sum()) == 132_955
    assert (per_document.min(), per_document.max(), (per_document >= 8).sum()) == (1, 21, 8_524)
    assert (per_system[6], per_system[10]) == (254, 8_862) == (per_system.min(), per_system.max())
    assert all(per_system[s - 1] > 7_800 for s in HIGH_COVERAGE_SYSTEMS)
