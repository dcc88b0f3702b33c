"""The house in floors: a module imports from the floors below it and from the rooms before it on its own, functions included.

`FLOORS` is the drawing, from the ground up. A new module or package of `pile_fast/` gets its place here.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "core": (
        "extras", "printable", "kernels", "_cpu", "_cuda", "checks", "terms", "options", "batch", "reference", "backends",
        "shared", "autograd", "functional", "loss", "__init__",
    ),
    "methods": ("ensembles", "evaluation"),
    "files and models": ("teachers", "data", "offline", "students", "trainer"),
    "doors": ("integrations", "cli", "__main__"),
}  # fmt: skip
ORDER = [room for rooms in FLOORS.values() for room in rooms]
# Beside Python's own library.
LIBRARIES = {"core": {"torch", "typing_extensions"}, "kernels": {"triton"}}  # torch brings typing_extensions
# What may not be, and why it is.
EXCEPTIONS = {
    ("kernels", "extras"),  # without Triton its import names the extra that brings it
    ("kernels", "torch"),  # a term's file also holds its launches over long lists, which take tensors
    ("kernels", "backends"),  # and the type of what launches them, for type checkers alone
    ("backends", "triton"),  # asks for its version
}
MODULES = {
    ".".join((package, *path.relative_to(folder).with_suffix("").parts)): path
    for folder, package in ((ROOT / "pile_fast", "pile_fast"), (ROOT / "kernels", "pile_fast.kernels"))
    for path in sorted(folder.rglob("*.py"))
}


def imported(name):
    """The full names of what a module imports, those of `from a import b` as a.b."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(name.split(".")[: -node.level]) if node.level else ""
            yield from (".".join(filter(None, (package, node.module, alias.name))) for alias in node.names)


@pytest.mark.parametrize("name", MODULES)
def test_who_may_import_whom(name):
    room = name.split(".")[1]
    assert room in ORDER, f"{name}: on which floor is it? FLOORS has no {room}"
    floor = next(floor for floor, rooms in FLOORS.items() if room in rooms)
    libraries = LIBRARIES.get(room) or LIBRARIES.get(floor)
    for target in imported(name):
        package, _, inside = target.partition(".")
        if package != "pile_fast":
            allowed = libraries is None or package in libraries | sys.stdlib_module_names
        else:
            package = inside.split(".")[0] if inside.split(".")[0] in ORDER else "__init__"
            allowed = package == room or room != "kernels" and ORDER.index(package) < ORDER.index(room)
        assert allowed or (room, package) in EXCEPTIONS, f"{name} imports {target}"
