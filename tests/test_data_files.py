"""Outputs that are whole or not there: written aside, resumed after a kill, one process at a time."""

import errno
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pile_fast.data import atomic_path, check_row, files, fingerprint, write_rows
from pile_fast.data.files import ahead
from pile_fast.offline.resumable import ResumableOutput


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


# A14
def test_two_writers_with_one_process_id_do_not_mix(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_path(path) as one, atomic_path(path) as two:
        one.write_text("one\n" * 1000)
        two.write_text("two\n" * 10)
    assert path.read_text() == "one\n" * 1000  # the last to end
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda i: write_rows(tmp_path / "b.jsonl", rows(200, 1000 * i)), range(16)))
    ids = [json.loads(line)["query_id"] for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    first = int(ids[0][1:])
    assert ids == [f"q{i}" for i in range(first, first + 200)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.txt", "b.jsonl"]


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    names = iter(["known" * 3, "unknown"])
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: next(names))
    for planted in (f".{os.getpid()}.a.txt", f".a.{'known' * 3}.txt"):
        (tmp_path / planted).symlink_to(victim)
    with atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert victim.read_text() == "precious" and (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_an_old_files_mode_is_kept_and_a_new_ones_is_the_umasks(tmp_path, name):
    path = tmp_path / name

    def mode():
        return stat.S_IMODE(path.stat().st_mode)

    before = os.umask(0o027)
    try:
        write_rows(path, rows(1))
        assert mode() == 0o640
        for wanted in (0o600, 0o444, 0o666):
            path.chmod(wanted)
            write_rows(path, rows(2))
            assert mode() == wanted
        path.chmod(0o600)
        with ResumableOutput(path, {}) as output:
            assert stat.S_IMODE(output.folder.stat().st_mode) == 0o700
            output.write(0, rows(1))
            output.finish()
        assert mode() == 0o600
    finally:
        os.umask(before)


def test_errors_name_the_file_to_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def read_only(path, flags, *rest, **options):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))
        return real(path, flags, *rest, **options)

    def no_space(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = os.open
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        for write in (lambda: write_rows("a.jsonl", rows(1)), lambda: ResumableOutput("a.jsonl", {})):
            with pytest.raises(OSError) as caught:
                write()
            assert (caught.value.filename, caught.value.strerror) == ("a.jsonl", "cannot write there: Read-only file system")
    with pytest.raises(OSError) as caught, atomic_path("a.jsonl"):
        no_space(None)
    assert (caught.value.filename, caught.value.strerror) == ("a.jsonl", "No space left on device")
    with pytest.raises(OSError) as caught, atomic_path("a.jsonl"):
        open("none.jsonl")
    assert caught.value.filename == "none.jsonl"  # it is about what was read
    with pytest.raises(OSError) as caught, atomic_path("a.jsonl") as temporary:
        temporary.unlink()
        temporary.mkdir()
        open(temporary, "w")
    assert caught.value.filename == "a.jsonl"


def test_long_names_have_room(tmp_path):
    path = tmp_path / ("é" * 120 + ".jsonl")
    write_rows(path, rows(1))
    assert list(tmp_path.iterdir()) == [path]


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
    (tmp_path / "a.parquet.parts" / ".00000003.0123456789abcdef.parquet").write_text("half a part of a killed process")
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
    for count in range(5):  # of three parts, settings and lock
        output = ResumableOutput(path, {"a": 1})
        for number in range(3):
            output.write(number, rows(5, 5 * number))
        left[0] = count
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


# A13
@pytest.mark.parametrize("place", [0, 100, 2**19, 2**20 - 1])
def test_a_fingerprint_sees_content_of_equal_size_and_time(tmp_path, place):
    source = tmp_path / "input"
    content = bytearray(2**20)
    source.write_bytes(content)
    before, status = fingerprint(source), source.stat()
    content[place] = 1
    source.write_bytes(content)
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    (after,) = fingerprint(source)
    assert after[:3] == before[0][:3] and after != before[0]
    source.write_bytes(b"")
    assert fingerprint(source)[0][1] == 0


def test_a_fingerprint_of_a_large_file_reads_blocks_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BLOCK", 4)
    monkeypatch.setattr(files, "_BLOCKS", 5)
    source = tmp_path / "input"
    source.write_bytes(bytes(40))
    status, before = source.stat(), fingerprint(source)
    seen = 0
    for place in range(40):
        source.write_bytes(bytes(place) + b"1" + bytes(39 - place))
        os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
        seen += fingerprint(source) != before
        assert fingerprint(source) != before or 4 <= place < 36
    assert seen == 20


def test_folders_of_parts_that_are_something_else_are_left_alone(tmp_path):
    path, folder = tmp_path / "a.parquet", tmp_path / "a.parquet.parts"
    other = tmp_path / "other"
    other.mkdir()
    (other / ".hidden").write_text("mine")
    (other / "7.parquet").write_text("mine")
    folder.symlink_to(other)
    with pytest.raises(ValueError, match="a.parquet.parts: expected the folder of an unfinished output or nothing"):
        ResumableOutput(path, {})
    folder.unlink()
    folder.write_text("a file")
    with pytest.raises(ValueError, match="a.parquet.parts: expected the folder of an unfinished output or nothing"):
        ResumableOutput(path, {})
    folder.unlink()
    other.rename(folder)
    with ResumableOutput(path, {}) as output:
        output.write(0, rows(1))
        output.finish()
    assert sorted(file.name for file in folder.iterdir()) == [".hidden", "7.parquet"]
    (folder / "00000000.parquet").write_text("no part of ours")
    with pytest.raises(ValueError, match="is not the folder of an unfinished output, or it is damaged"):
        ResumableOutput(path, {})
    assert (folder / "00000000.parquet").exists()


def test_a_damaged_part_is_named(tmp_path):
    with ResumableOutput(tmp_path / "a.parquet", {}) as output:
        output.write(0, rows(5))
        output.write(1, rows(5, 5))
        (output.folder / "00000001.parquet").write_bytes(b"PAR1 junk")
        with pytest.raises(ValueError, match="00000001.parquet: damaged part: .*; remove it and run the command again"):
            output.finish()
    assert [file.name for file in tmp_path.iterdir()] == ["a.parquet.parts"]


def test_one_process_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    with ResumableOutput(tmp_path / "a.parquet", {}):
        with pytest.raises(ValueError, match="a.parquet: another process is writing this file"):
            ResumableOutput(tmp_path / "a.parquet", {})
        ResumableOutput(tmp_path / "b.parquet", {}).close()
    ResumableOutput(tmp_path / "a.parquet", {}).close()


def test_a_file_system_without_locks_is_written_to_as_well(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*arguments):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with ResumableOutput(tmp_path / "a.parquet", {}) as output:
        output.write(0, rows(1))
        output.finish()
    assert [file.name for file in tmp_path.iterdir()] == ["a.parquet"]


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
