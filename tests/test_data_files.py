"""Outputs that are whole or not there: written aside, resumed after a kill, one process at a time."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pile_fast.data import ResumableOutput, atomic_path, check_row, fingerprint, write_rows
from pile_fast.data.files import ahead


def rows(count, start=0):
    return [check_row({"query_id": f"q{i}", "documents": [f"text {i}"], "labels": [i]}) for i in range(start, start + count)]


def test_atomic_path_replaces_in_one_step(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.suffix == ".txt" and temporary.parent == tmp_path
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_path_leaves_the_old_file_when_anything_fails(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_atomic_path_follows_links_and_refuses_what_is_no_file(tmp_path):
    (tmp_path / "link").symlink_to("target")
    with atomic_path(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"
    with pytest.raises(OSError, match=r"cannot write there: No such file or directory: .*none/a.txt"):
        with atomic_path(tmp_path / "none" / "a.txt"):
            pytest.fail("got a path to write to")
    for path in (tmp_path, "/dev/null"):
        with pytest.raises(OSError, match="not a regular file"), atomic_path(path):
            pytest.fail("got a path to write to")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.parquet", "a.txt", "a.run"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, disk_full, name):
    path = tmp_path / name
    path.write_text("old")
    disk_full(path)
    data = [check_row({"query_id": "q", "features": [[1.0]], "labels": [1], "teacher_logits": [[1.0]]})]
    with pytest.raises(OSError, match="No space left on device"):
        write_rows(path, data)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.parquet"])
def test_the_same_rows_give_the_same_bytes(tmp_path, name):
    (tmp_path / "other").mkdir()
    for path in (tmp_path / name, tmp_path / "other" / name):
        write_rows(path, rows(3000))
    assert (tmp_path / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


# -- numbered parts


def test_interrupted_and_resumed_gives_the_same_file(tmp_path):
    whole, path = tmp_path / "whole.parquet", tmp_path / "a.parquet"
    with ResumableOutput(whole, {"a": 1}) as output:
        for number in range(4):
            output.write(number, rows(50, 50 * number))
        output.finish()
    path.write_text("old")
    with ResumableOutput(path, {"a": 1}) as output:
        assert output.done == set()
        output.write(0, rows(50))
        output.write(2, rows(50, 100))
    (tmp_path / "a.parquet.parts" / ".123.00000003.parquet").write_text("half a part of a killed process")
    with ResumableOutput(path, {"a": 1}) as output:
        assert output.done == {0, 2}
        with pytest.raises(ValueError, match="a.parquet: part 1 is missing"):
            output.finish()
        assert path.read_text() == "old"
        output.write(1, rows(50, 50))
        output.write(3, pa.Table.from_pylist(rows(50, 150), pq.read_schema(whole)))
        output.finish()
    assert path.read_bytes() == whole.read_bytes()
    assert pq.read_table(path)["query_id"].to_pylist() == [f"q{i}" for i in range(200)]
    assert sorted(tmp_path.iterdir()) == [path, whole]


def test_killed_while_the_parts_are_removed(tmp_path, monkeypatch):
    """The file is in its place by then; the same command once more leaves it as it is, and nothing else."""
    path = tmp_path / "a.parquet"
    unlink, left = type(path).unlink, [0]

    def unlink_some(file, *arguments, **options):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        unlink(file, *arguments, **options)

    def run():
        with ResumableOutput(path, {"a": 1}) as output:
            for number in range(3):
                if number not in output.done:
                    output.write(number, rows(5, 5 * number))
            output.finish()

    run()
    content = path.read_bytes()
    for files in range(5):  # of three parts, settings and lock
        output = ResumableOutput(path, {"a": 1})
        for number in range(3):
            output.write(number, rows(5, 5 * number))
        left[0] = files
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(type(path), "unlink", unlink_some)
            output.finish()
        os.close(output._lock)  # as when the process ends
        assert path.read_bytes() == content
        run()
        assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def test_other_settings_or_another_input_are_refused(tmp_path):
    source = tmp_path / "input"
    source.write_text("1")
    settings = {"model": "a", "input": fingerprint(source)}
    with ResumableOutput(tmp_path / "a.parquet", settings) as output:
        output.write(0, rows(1))
    with pytest.raises(ValueError, match=r"a.parquet.parts holds .* \(model differ\): remove the folder to start again"):
        ResumableOutput(tmp_path / "a.parquet", settings | {"model": "b"})
    source.write_text("22")
    with pytest.raises(ValueError, match=r"\(input differ\)"):
        ResumableOutput(tmp_path / "a.parquet", settings | {"input": fingerprint(source)})
    with ResumableOutput(tmp_path / "a.parquet", settings) as output:  # a refusal lets go of the lock
        assert output.done == {0}


def test_one_process_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    with ResumableOutput(tmp_path / "a.parquet", {}):
        with pytest.raises(ValueError, match="a.parquet: another process is writing this file"):
            ResumableOutput(tmp_path / "a.parquet", {})
        ResumableOutput(tmp_path / "b.parquet", {}).close()
    ResumableOutput(tmp_path / "a.parquet", {}).close()


def test_nothing_written_and_nowhere_to_write(tmp_path):
    with ResumableOutput(tmp_path / "a.parquet", {}) as output, pytest.raises(ValueError, match="no parts were written"):
        output.finish()
    with pytest.raises(OSError, match="not a regular file"):
        ResumableOutput(tmp_path, {})
    with pytest.raises(OSError, match="none"):
        ResumableOutput(tmp_path / "none" / "a.parquet", {})


def test_ahead_gives_everything_and_passes_errors_on():
    def broken():
        yield 1
        raise ValueError("reason")

    assert list(ahead(iter(range(5)))) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="reason"):
        list(ahead(broken()))
