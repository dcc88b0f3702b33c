"""What nvcc made of the CUDA kernels, read from the built extension: registers, stack and shared memory per architecture.

`python tests/cuda_resources.py` prints the table of docs/cuda.md, `--write` puts it there (`make cuda-table`).
"""

import functools
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# From the kernels' launch bounds, 65,536 registers a multiprocessor.
_THREADS = {"warp_per_query": (128, 4), "block_per_query": (512, 1), "block_per_long_query": (256, 1)}
_WHAT = {
    "warp_per_query": "short lists, a warp per query",
    "block_per_query": "short lists, a block per query",
    "block_per_long_query": "a packed list beyond shared memory",
    "reduce_queries": "reduction over queries",
    "advance_pieces": "long lists: an iteration",
    "solve_label_blocks": "long lists: fields of the label pairs",
    "add_pieces": "long lists: the terms of the loss",
    "total_gains": "long lists: what a term that takes gains divides by",
    "rank_pieces": "long lists: ranks",
    "sum_pieces": "long lists: sums of a term by lists",
    "deposit_students": "long lists: moments of the label pairs",
    "deposit_distillation": "long lists: moments of the logistic distillation",
    "solve_distillation": "long lists: its fields",
    "tabulate": "long lists: the table, once a call",
}


def most_registers(kernel: str) -> int:
    threads, blocks = _THREADS.get(kernel, (256, 1))
    return min(255, 65536 // (threads * blocks))


def tool(name: str) -> str:
    """cuobjdump or nvdisasm: the toolkit's, or the one that Triton brings."""
    if found := shutil.which(name):
        return found
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def kernel_name(symbol: str) -> str:
    """The last name of a mangled symbol's nested name, whatever template arguments follow."""
    if not symbol.startswith("_ZN"):
        return symbol
    names, at = [], len("_ZN")
    while length := re.match(r"\d+", symbol[at:]):
        at += len(length[0])
        names.append(symbol[at : at + int(length[0])])
        at += int(length[0])
    return names[-1]


@functools.cache
def resources() -> dict:
    """{(kernel, "sm_90"): {"registers", "stack", "shared"}} of the installed pile_fast._cuda; of a template the most."""
    import pile_fast._cuda

    text = subprocess.run(
        [tool("cuobjdump"), "-res-usage", pile_fast._cuda.__file__], capture_output=True, text=True, check=True
    ).stdout
    found, arch, kernel = {}, None, None
    for line in text.splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+?):", line):
            kernel = kernel_name(match[1])
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            own = dict(zip(("registers", "stack", "shared"), map(int, match.groups()), strict=True))
            before = found.get((kernel, arch), own)
            found[kernel, arch] = {name: max(own[name], before[name]) for name in own}
    return found


def loops(kernel: str, arch: str) -> list[dict]:
    """The loops of a kernel: how many instructions, and of these reciprocals, exponentials, logarithms, shared loads and float
    instructions."""
    import pile_fast._cuda

    code, labels, found = [], {}, []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [tool("cuobjdump"), "-xelf", arch, pile_fast._cuda.__file__], cwd=folder, capture_output=True, check=True
        )
        for cubin in Path(folder).iterdir():
            text = subprocess.run([tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True).stdout
            inside = False
            for line in text.splitlines():
                if section := re.match(r"\.text\.(\S+):", line):
                    inside = kernel_name(section[1]) == kernel
                elif inside and (label := re.match(r"\s*(\.L_x_\w+):", line)):
                    labels[label[1]] = len(code)
                elif inside and (own := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)(.*?);", line)):
                    code.append((own[1], own[2]))
    kinds = dict(
        reciprocals="MUFU.RCP", exponentials="MUFU.EX2", logarithms="MUFU.LG2", loads="LDS", floats=("FFMA", "FMUL", "FADD")
    )
    for at, (name, operands) in enumerate(code):
        target = re.search(r"\.L_x_\w+", operands) if name.startswith("BRA") else None
        if target and labels.get(target[0], at + 1) <= at:
            body = [each for each, _ in code[labels[target[0]] : at + 1]]
            counts = {kind: sum(each.startswith(start) for each in body) for kind, start in kinds.items()}
            found.append(dict(instructions=len(body), **counts))
    return found


def table() -> str:
    found = resources()
    archs = sorted({arch for _, arch in found}, key=lambda arch: int(arch[3:]))
    lines = ["| kernel | what | " + " | ".join(archs) + " |", "|---|---|" + "---|" * len(archs)]
    names = [*_WHAT, *sorted({kernel for kernel, _ in found} - set(_WHAT))]
    for name in names:
        cells = []
        for arch in archs:
            use = found[name, arch]
            cells.append(f"{use['registers']}" + (f", stack {use['stack']}" if use["stack"] else ""))
        lines.append(f"| `{name}` | {_WHAT.get(name, 'long lists')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    text = table()
    print(text)
    if "--write" in sys.argv:
        page = Path(__file__).resolve().parents[1] / "docs/cuda.md"
        begin, end = "<!-- resources -->", "<!-- /resources -->"
        old = page.read_text()
        page.write_text(old[: old.index(begin) + len(begin)] + "\n" + text + "\n" + old[old.index(end) :])
