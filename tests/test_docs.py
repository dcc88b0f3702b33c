"""Pages that can be checked against the code are."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("pile_fast", "kernels", "csrc", "benchmarks", "tests")


def test_the_page_of_environment_variables_has_all_of_them_and_no_others():
    files = [path for folder in SOURCES for path in ROOT.glob(f"{folder}/**/*") if path.suffix in (".py", ".h", ".cpp", ".cu")]
    files += [ROOT / "setup.py", ROOT / "Makefile"]
    used = {name for path in files for name in re.findall(r"PILE_FAST_[A-Z_]+", path.read_text())}
    rows = re.findall(r"^\| `(\w+)`", (ROOT / "docs/environment.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(used)
