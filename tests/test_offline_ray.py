"""Ensembles on Ray Data, in one local Ray of two workers."""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pile_fast.cli import main
from pile_fast.data import check_row, make_synthetic, write_rows
from pile_fast.offline.ensemble import OfflineEnsemble

pytestmark = pytest.mark.usefixtures("one_thread")
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'pile_fast[ray]'")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The rows of two files in a folder "data"."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name, seed in (("a", 0), ("b", 1)):
        lists = make_synthetic(30, documents=(1, 20), seed=seed)
        rows = [
            check_row(
                {
                    "query_id": f"{name}.{query}",
                    "labels": row["labels"].tolist(),
                    "teacher_logits": [[None if x != x else x for x in xs] for xs in row["teacher_logits"].tolist()],
                }
            )
            for query, row in zip(lists.query_ids, lists, strict=True)
        ]
        write_rows(tmp_path / f"data/{name}.parquet", rows)
    return tmp_path


def by_query(table):
    return sorted(table.to_pylist(), key=lambda row: row["query_id"])


def test_the_command_and_the_example_give_what_one_process_gives(ray, folder, capsys):
    wanted = by_query(OfflineEnsemble(iterations=3)(pq.read_table("data")))
    assert main(["ensemble", "data", "--output", "ensembled", "--ray", "--iterations", "3"]) == 0
    out = capsys.readouterr().out
    assert "Teachers' weights (from " in out and "Wrote ensembled." in out
    assert by_query(pq.read_table("ensembled")) == wanted
    assert {path.name for path in folder.iterdir()} == {"data", "ensembled"}

    (example,) = re.findall(r"```python\n(import ray\n.*?)```", (DOCS / "data.md").read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 10
    exec(example)
    assert by_query(pq.read_table("with_ensemble")) == by_query(OfflineEnsemble()(pq.read_table("data")))


def test_a_batch_alone_does_not_learn_what_all_queries_share(ray):
    from pile_fast.offline.ray import RayEnsemble

    with pytest.raises(ValueError, match="fit: weights that all queries share are not a batch's to learn"):
        RayEnsemble("pile")
    for options in ({"iterations": 0}, {"granularity": "document"}):
        RayEnsemble("pile", **options)


def test_what_the_user_can_put_right_is_one_line(ray, folder, capsys):
    def error_of(*arguments):
        assert main(["ensemble", *arguments, "--ray"]) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pile-fast")]
        return line.removeprefix("pile-fast: error: ")

    assert error_of("none", "--output", "out").endswith("none: no such file or folder")
    assert error_of("data", "--output", "data").endswith("data: it is there already, name a new folder")
    table = pq.read_table("data/a.parquet")
    pq.write_table(table.drop_columns("labels"), "unlabelled.parquet")
    document = ["--granularity", "document"]
    line = error_of("unlabelled.parquet", "--output", "out", *document)
    assert "unlabelled.parquet: missing column labels, there are query_id" in line
    assert {path.name for path in folder.iterdir()} == {"data", "unlabelled.parquet"}


# A2, A3 on Ray: the same checks, by file and row
def test_teachers_are_matched_by_name_and_the_same_in_all_files(ray, folder, capsys):
    def named(table, names):
        return table.append_column("teachers", pa.array([names] * table.num_rows))

    tables = {name: pq.read_table(f"data/{name}.parquet").select(["query_id", "labels", "teacher_logits"]) for name in "ab"}
    names = [f"t{m}" for m in range(6)]
    for name, table in tables.items():
        pq.write_table(named(table, names), f"data/{name}.parquet")
    turned = [[scores[::-1] for scores in row] for row in tables["a"]["teacher_logits"].to_pylist()]
    turned = tables["a"].set_column(2, "teacher_logits", pa.array(turned, tables["a"]["teacher_logits"].type))
    pq.write_table(named(turned, names[::-1]), "fit.parquet")
    arguments = ["--method", "best", "--fit", "fit.parquet"]
    assert main(["ensemble", "data", "--output", "out", "--ray", *arguments]) == 0
    assert main(["ensemble", "data", "--output", "out.parquet", *arguments]) == 0
    wanted = by_query(OfflineEnsemble("best", fit=pq.read_table("data/a.parquet"))(pq.read_table("data")))
    for name in ("out", "out.parquet"):
        got = by_query(pq.read_table(name))
        assert [row["query_id"] for row in got] == [row["query_id"] for row in wanted]
        for one, two in zip(got, wanted, strict=True):
            assert one["ensemble_logits"] == pytest.approx(two["ensemble_logits"], abs=1e-5)

    def error_of(*arguments):
        capsys.readouterr()
        assert main(["ensemble", "data", "--output", "none", "--ray", *arguments]) == 1
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("pile-fast")][-1]

    pq.write_table(named(tables["b"], ["other", *names[1:]]), "fit.parquet")
    assert "data: teachers: 'other' of fit is missing" in error_of(*arguments)
    pq.write_table(named(tables["b"], names[::-1]), "data/b.parquet")
    assert "data/b.parquet: row 1: teachers: expected ['t0', 't1'" in error_of("--method", "mean")
    assert {path.name for path in folder.iterdir()} == {"data", "fit.parquet", "out", "out.parquet"}


def test_without_ray_the_command_says_what_to_install(folder, capsys, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name == "ray" or name.startswith("ray.")] + ["ray"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "pile_fast.offline.ray", raising=False)
    assert main(["ensemble", "data", "--output", "out", "--ray"]) == 1
    assert "pip install 'pile_fast[ray]'" in capsys.readouterr().err
