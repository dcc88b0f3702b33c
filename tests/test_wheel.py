"""The package as a stranger has it: built, installed into an environment of its own, run far from the checkout (A1, C5).

The environments borrow what is installed beside these tests, by a path file that brings no editable installation along.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from packaging.requirements import Requirement

import pile_fast
from pile_fast.data import find_data, load_mq2008, make_synthetic

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"pile_fast": "pile_fast", "kernels": "pile_fast/kernels"}  # in the checkout, and where they are installed
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
COMMANDS = re.findall(r"^\| `pile-fast (\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)


def run(*command, expect=0, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == expect, f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


# What the whole session shares -----------------------------------------------------------------------------------------------


def checkout() -> dict[str, Path]:
    """The checkout's files by their names in it; without hidden ones and what was built or written there."""
    files = [path for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".")]
    for folder in (*FOLDERS, "csrc", "tests", "docs", "benchmarks"):
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in (".so", ".pyc")]
    names = {path.relative_to(ROOT).as_posix(): path for path in files}
    return {name: path for name, path in names.items() if not name.startswith("benchmarks/results/")}


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """The checkout's files alone: no build folder, nothing that was installed from it."""
    copy = tmp_path_factory.mktemp("tree") / "pile_fast"
    for name, path in checkout().items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy / name)
    return copy


def build(kind, source, target, **environment):
    """The file that was built, and what the build said. Objects of the checkout's own build are used again."""
    defaults = {"PILE_FAST_OBJECTS": str(ROOT / "build"), "PILE_FAST_CUDA": "0", "PILE_FAST_REQUIRE_CPU": "0"}
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", target, source]
    done = run(*command, cwd=target.parent, env=os.environ | defaults | environment)
    (made,) = target.iterdir()
    return made, done.stdout + done.stderr


@pytest.fixture(scope="session")
def sdist(tree, tmp_path_factory):
    return build("sdist", tree, tmp_path_factory.mktemp("sdist"))[0]


@pytest.fixture(scope="session")
def wheels(tree, sdist, tmp_path_factory):
    """Each with what its build said: one of the sdist, which has all the sources, one of the tree, without a compiler."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as tar:
        tar.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    return {
        "compiled": build("wheel", source, tmp_path_factory.mktemp("compiled"), PILE_FAST_REQUIRE_CPU="1"),
        "no compiler": build("wheel", tree, tmp_path_factory.mktemp("plain"), **NO_COMPILER),
    }


@dataclass
class Environment:
    """A virtual environment and a folder to work in; no setting of the tests' own reaches what runs there."""

    folder: Path
    work: Path

    def __post_init__(self):
        venv.create(self.folder, with_pip=False, symlinks=True)
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.packages = Path(run(self.folder / "bin/python", "-c", code).stdout.strip())

    def python(self, *arguments, **options):
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PILE_FAST", "PYTHON"))}
        env["OMP_NUM_THREADS"] = "1"  # for data this small: other tests run beside these
        return run(self.folder / "bin/python", *arguments, cwd=self.work, env=env, **options)

    def command(self, *arguments, **options):
        """`pile-fast` as it was installed."""
        return self.python(self.folder / "bin/pile-fast", *arguments, **options)

    def install(self, wheel: Path):
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.folder / "bin/python"]
        run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=self.work)


def site_packages() -> list[str]:
    return [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]


@pytest.fixture(scope="session", params=["compiled", "no compiler"])
def installed(request, wheels, tmp_path_factory):
    """Everything is there that is there for the tests."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "work").mkdir()
    environment = Environment(folder / "env", folder / "work")
    environment.install(wheels[request.param][0])
    (environment.packages / "borrowed.pth").write_text("\n".join(site_packages()) + "\n")
    environment.kind = request.param
    return environment


def requirements(distributions: Iterable[str]) -> set[str]:
    """The distributions, and all that they need."""
    found, wanted = set(), list(distributions)
    while wanted:
        name = wanted.pop()
        if name not in found:
            found.add(name)
            needs = map(Requirement, importlib.metadata.requires(name) or ())
            wanted += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="session")
def bare(wheels, tmp_path_factory):
    """After a plain ``pip install pile_fast``: what it requires is there, no extra is."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "work").mkdir()
    environment = Environment(folder / "env", folder / "work")
    wheel = wheels["no compiler"][0]
    environment.install(wheel)
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    needs = [Requirement(line.removeprefix("Requires-Dist: ")) for line in lines if line.startswith("Requires-Dist: ")]
    for name in requirements(need.name for need in needs if need.marker is None):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (environment.packages / top).exists():
                (environment.packages / top).symlink_to(distribution.locate_file(top))
    return environment


# What is in the files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["compiled", "no compiler"])
def test_a_wheel_holds_the_trees_files(wheels, kind):
    """A1: packages were listed by hand, and one was forgotten."""
    wanted = {
        f"{FOLDERS[folder]}/{below}": path
        for name, path in checkout().items()
        for folder, _, below in [name.partition("/")]
        if folder in FOLDERS
    }
    assert {"pile_fast/students/__init__.py", "pile_fast/kernels/pile.py"} <= wanted.keys()
    with zipfile.ZipFile(wheels[kind][0]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        libraries = {name for name in names if name.endswith(".so")}
        assert [name.split(".")[0] for name in libraries] == ["pile_fast/_cpu"] * (kind == "compiled")
        assert names - libraries == wanted.keys()
        assert all(archive.read(name) == path.read_bytes() for name, path in wanted.items())


def test_an_sdist_holds_sources_tests_and_pages(sdist):
    with tarfile.open(sdist) as tar:
        names = {Path(*Path(member.name).parts[1:]).as_posix() for member in tar if member.isfile()}
    generated = {name for name in names if name.startswith("pile_fast.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - generated == checkout().keys()


def test_without_a_compiler_one_line_says_so(wheels):
    """C5."""
    compiled, plain = (wheels[kind][1] for kind in ("compiled", "no compiler"))
    assert "WARNING: pile_fast._cpu" not in compiled
    (line,) = (line for line in plain.splitlines() if "WARNING: pile_fast._cpu" in line)
    assert "was not built" in line and NO_COMPILER["CXX"] in line and "install a C++17 compiler" in line


def test_a_compiler_that_was_asked_for_is_an_error(tree, tmp_path):
    with pytest.raises(AssertionError, match=NO_COMPILER["CXX"]):
        build("wheel", tree, tmp_path, PILE_FAST_REQUIRE_CPU="1", **NO_COMPILER)


# What is installed -----------------------------------------------------------------------------------------------------------

IMPORT_EVERYTHING = """
import importlib, importlib.metadata, json, pkgutil
import pile_fast
assert importlib.metadata.version("pile_fast") == pile_fast.__version__, "two versions"
names, failures = ["pile_fast"], {}
for module in pkgutil.walk_packages(pile_fast.__path__, "pile_fast.", onerror=lambda name: None):
    if not module.name.endswith("__main__"):
        names.append(module.name)
for name in names:
    try:
        file = importlib.import_module(name).__file__
        assert file.startswith(PACKAGES), file
    except ImportError as error:
        failures[name] = str(error)
helps = {}
for name in COMMANDS:
    helps[name] = io.StringIO()
    with contextlib.redirect_stdout(helps[name]), contextlib.redirect_stderr(helps[name]):
        code = importlib.import_module("pile_fast.cli").main([name, "--help"])
    helps[name] = [code, helps[name].getvalue()]
print(json.dumps([pile_fast.__version__, names, failures, helps]))
"""


def import_everything(environment):
    """The modules that are there, the errors of those that lack a library, and each command's --help: exit code and text."""
    values = f"PACKAGES, COMMANDS = {str(environment.packages)!r}, {COMMANDS}\nimport contextlib, io\n"
    out = environment.python("-c", values + IMPORT_EVERYTHING).stdout
    version, names, failures, helps = json.loads(out.splitlines()[-1])
    assert version == pile_fast.__version__ and len(helps) == 8
    return set(names), failures, helps


def test_every_module_imports_and_every_command_helps(installed):
    names, failures, helps = import_everything(installed)
    assert {"pile_fast.students.ranker", "pile_fast.cli.train", "pile_fast.kernels.pile", "pile_fast.trainer"} <= names
    assert ("pile_fast._cpu" in names) == (installed.kind == "compiled")
    # Lightning-IR cannot live beside sentence-transformers.
    assert failures.keys() <= {"pile_fast.integrations.lightning_ir"}, failures
    assert all("pip install 'pile_fast[lightning-ir]'" in error for error in failures.values()), failures
    for command, (code, text) in helps.items():
        assert code == 0 and text.startswith(f"usage: pile-fast {command} "), text
    assert installed.command("--version").stdout == f"pile_fast {pile_fast.__version__}\n"


def test_without_extras_each_module_and_command_works_or_names_its_extra(bare):
    names, failures, helps = import_everything(bare)
    extras = bare.python("-c", "import importlib.metadata as m; print(*m.metadata('pile_fast').get_all('Provides-Extra'))")
    for name, error in failures.items():
        (extra,) = re.findall(r"pip install 'pile_fast\[(.+?)\]'", error)
        assert extra in extras.stdout.split(), (name, error)
    working = names - failures.keys()
    expected = {"pile_fast.functional", "pile_fast.ensembles", "pile_fast.data", "pile_fast.evaluation", "pile_fast.cli"}
    assert expected <= working
    assert {"pile_fast.trainer", "pile_fast.students", "pile_fast.offline.ray"} <= failures.keys()
    code, error = helps.pop("train")  # its options are transformers' own
    assert code == 1 and re.fullmatch(r"pile-fast: error: .*pip install 'pile_fast\[train\]'\n", error), error
    assert all(code == 0 and text.startswith("usage: ") for code, text in helps.values()), helps


def test_imports_warn_of_nothing(bare):
    bare.python(
        "-W", "error", "-c", "import pile_fast, pile_fast.ensembles, pile_fast.evaluation, pile_fast.data, pile_fast.cli"
    )


# What it does ----------------------------------------------------------------------------------------------------------------


def test_it_runs_and_says_what_works(installed):
    out = installed.python("-m", "pile_fast").stdout
    (status,) = re.findall(r"backend cpp +(.*)", out)
    if installed.kind == "compiled":
        assert status.startswith("works")
    else:  # C5: it blamed a "circular import"
        assert status.startswith("no: the compiled library was not built: ") and "compiler" in status, status
    loss = "import torch, pile_fast; print(pile_fast.PILELoss()(torch.zeros(1, 3), torch.eye(3)[None], torch.arange(3)[None]))"
    assert "tensor(" in installed.python("-c", loss).stdout


@pytest.fixture(scope="session")
def queries(tmp_path_factory):
    """Folder of train.jsonl and test.jsonl: some of MQ2008's queries, or generated ones."""
    folder = find_data("mq2008")
    lists = load_mq2008(folder) if folder and (folder / "mq2008").is_dir() else make_synthetic(queries=120)
    work = tmp_path_factory.mktemp("queries")
    for name, part in (("train", lists.select(range(60))), ("test", lists.select(range(60, 100)))):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part.rows()))
    texts = {"query_id": "q", "query": "blue sky", "documents": ["why the sky is blue", "a song"], "labels": [1, 0]}
    (work / "texts.jsonl").write_text(json.dumps(texts) + "\n")
    return work


FILES_TO_A_STUDENT = [
    line.split()
    for line in """
convert train.jsonl --output train.parquet
convert test.jsonl --output test.parquet
inspect train.parquet --output inspected
ensemble train.parquet --output ensemble.parquet
train train.parquet --validation test.parquet --student features --output-dir student --num-train-epochs 2 --report-to none
score test.parquet --teacher student=student --output scored.parquet
score texts.jsonl --teacher bm25 --output texts.parquet
evaluate scored.parquet --teachers --model model=student --metrics ndcg@10 --baseline student --output evaluated
""".strip().splitlines()
]


def test_from_files_to_a_student(installed, queries):
    """A1: the README's commands, one after the other."""
    shutil.copytree(queries, installed.work, dirs_exist_ok=True)
    if installed.kind == "compiled":
        for arguments in FILES_TO_A_STUDENT:
            installed.command(*arguments)
    else:  # in one process, which spares the imports
        installed.python("-c", f"from pile_fast.cli import main\nfor a in {FILES_TO_A_STUDENT}: assert main(a) == 0, a")

    work = installed.work
    assert (work / "inspected/report.html").stat().st_size > 10_000
    ensemble = pq.read_table(work / "ensemble.parquet")
    documents = [len(labels) for labels in ensemble["labels"].to_pylist()]
    assert [len(logits) for logits in ensemble["ensemble_logits"].to_pylist()] == documents and len(documents) == 60
    scored = pq.read_table(work / "scored.parquet")
    assert scored.num_rows == 40 and scored["teachers"][0].as_py()[-1] == "student"
    (sky,) = pq.read_table(work / "texts.parquet")["teacher_logits"].to_pylist()
    assert sky[0][0] > sky[1][0]
    systems = {s["name"]: s for s in json.loads((work / "evaluated/metrics.json").read_text())["systems"]}
    assert (
        "model" in systems
        and systems["model"]["metrics"]["ndcg@10"]["value"] == systems["student"]["metrics"]["ndcg@10"]["value"]
    )
