"""Compile the Triton kernels ahead of time for GPUs that are not here, and read what became of them.

`python tests/triton_aot.py` prints the table of docs/triton.md, `--write` puts it there. test_triton.py checks a part of it.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from pile_fast.kernels.loss import reduce_kernel
from pile_fast.kernels.pile import pile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pile_fast.backends.triton import _config

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

POINTERS = dict(
    student=None, teachers=None, target=None, labels="*fp32", mask=None, cu_seqlens=None, block_ends=None, owner=None,
    prior=None, logits=None, weights=None, trace=None, losses=None, has_pairs=None, gradient=None, scratch="*fp32",
)  # fmt: skip
ENSEMBLE = dict(teachers="*fp32", logits="*fp32")
LOSS = dict(student="*fp32", target="*fp32", losses="*fp32", has_pairs="*i32", gradient="*fp32")
PACKED = dict(cu_seqlens="*i32", block_ends="*i64", owner="*i32")
OPTIONS = dict(
    PHASE="all", ENSEMBLE=True, LOSS=True, BY_DOCUMENT=True, NORMALIZE="zscore", WEIGHT="none", MARGIN=False, TRACE=False,
    USE_D=True, MSE=False, USE_R=False, WITH_GRADIENT=True, MASKED=False, PACKED=False,
)  # fmt: skip


class Case(NamedTuple):
    name: str
    slots: int
    teachers: int
    pointers: dict
    options: dict


FUSED = ENSEMBLE | LOSS
CASES = [
    Case("pile_loss, 32 documents", 32, 4, FUSED, {}),
    Case("pile_loss, 64 documents", 64, 4, FUSED, {}),
    Case("pile_loss, 128 documents", 128, 4, FUSED, {}),
    Case("pile_loss, 128 documents, 8 teachers", 128, 8, FUSED, {}),
    Case(
        "pile_loss, by query, label gaps, margin, alpha 0.5, masked, bf16, int64 labels", 128, 4,
        FUSED | dict(mask="*u8", labels="*i64", student="*bf16", teachers="*bf16", gradient="*bf16", prior="*fp32"),
        dict(BY_DOCUMENT=False, WEIGHT="label_gap", MARGIN=True, USE_R=True, MASKED=True),
    ),
    Case(
        "pile_ensemble, packed, weights, trace, fp16, 16 teachers", 128, 16,
        ENSEMBLE | dict(cu_seqlens="*i64", teachers="*fp16", weights="*fp32", trace="*fp32"),
        dict(LOSS=False, USE_D=False, TRACE=True, PACKED=True, WEIGHT="gain_gap", WITH_GRADIENT=False),
    ),
    Case("pile_ensemble, 128 teachers", 128, 128, ENSEMBLE, dict(LOSS=False, USE_D=False, WITH_GRADIENT=False)),
    Case("mean squared differences", 128, 1, LOSS, dict(ENSEMBLE=False, MSE=True)),
    Case("pairwise_logistic_loss", 128, 1, LOSS | dict(target=None), dict(ENSEMBLE=False, USE_D=False, USE_R=True)),
    *(
        Case(f"long lists, packed: {phase}", 1 << 20, 8, FUSED | PACKED, dict(PHASE=phase, PACKED=True, USE_R=True))
        for phase in (
            "ranks", "statistics", "calibrate", "counts", "iterate", "output", "load", "loss_sums", "pairs",
            "loss_total", "gradient",
        )
    ),
    *(
        Case(f"long lists, by query: {phase}", 1 << 20, 8, FUSED, dict(PHASE=phase, BY_DOCUMENT=False))
        for phase in ("totals", "iterate", "reweight", "tilt")
    ),
    *(
        Case(f"long lists: {phase}", 1 << 20, 8, FUSED | dict(trace="*fp32"), dict(PHASE=phase, TRACE=True))
        for phase in ("trace_rows", "trace_sum")
    ),
]  # fmt: skip

FLOATS = ("step", "inv_temperature", "offset", "alpha", "inv_tau")


def compile_case(case: Case, target: str):
    config = _config(case.slots, case.teachers)
    launch = {k: config.pop(k) for k in ("num_warps", "enable_fp_fusion")}
    constants = OPTIONS | case.options | config | dict(APPROX=target.startswith("sm_"))
    return compile_kernel(pile_kernel, POINTERS | case.pointers, constants, target, launch)


def compile_reduction(target: str):
    pointers = dict(losses="*fp32", has_pairs="*i32", total="*fp32", gradient="*fp32", scaled="*bf16")
    constants = dict(MEAN=True, WITH_GRADIENT=True, BLOCK=1024)
    return compile_kernel(reduce_kernel, pointers, constants, target, dict(num_warps=4, enable_fp_fusion=True))


def compile_kernel(kernel, pointers, constants, target, launch):
    signature, fixed = {}, {}
    for name in kernel.arg_names:
        if name in constants or (name in pointers and pointers[name] is None):
            signature[name] = "constexpr"
            fixed[name] = constants.get(name)
        else:
            signature[name] = pointers.get(name) or ("fp32" if name in FLOATS else "i32")
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
    return triton.compile(source, target=TARGETS[target], options=launch)


def resources(compiled) -> dict:
    """Registers, spilled registers (on NVIDIA: bytes of stack), shared bytes and, on NVIDIA, counts of instructions."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        number = lambda key: max(int(x) for x in re.findall(rf"\.{key}:\s*(\d+)", text))  # noqa: E731
        # Scalar registers are kept in lanes of vector registers where they run out; what counts is memory.
        return dict(registers=number("vgpr_count"), spills=number("vgpr_spill_count"), shared=compiled.metadata.shared)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return dict(registers=int(registers), spills=int(stack), shared=compiled.metadata.shared) | innermost_loop(sass)


def innermost_loop(sass: str) -> dict:
    """The loop with fewest exponentials, then fewest instructions, among those with eight reciprocals or more."""
    labels, code = {}, []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)(.*?);", line):
            code.append((instruction[1], instruction[2]))
    best = {}
    for at, (name, operands) in enumerate(code):
        target = re.search(r"\.L_x_\w+", operands) if name.startswith("BRA") else None
        if target and labels.get(target[0], at + 1) <= at:
            body = [x for x, _ in code[labels[target[0]] : at + 1]]
            reciprocals = sum(x.startswith("MUFU.RCP") for x in body)
            exponentials = sum(x.startswith("MUFU.EX2") for x in body)
            if reciprocals >= 8 and (not best or (exponentials, len(body)) < (best["exponentials"], best["loop"])):
                loads = sum(x.startswith("LDG") for x in body)
                local = sum(x.startswith(("LDL", "STL")) for x in body)
                best = dict(loop=len(body), reciprocals=reciprocals, exponentials=exponentials, loads=loads, local=local)
    return best


def table() -> str:
    lines = [
        f"Triton {triton.__version__}; registers per thread / bytes of shared memory.",
        "",
        "| kernel | " + " | ".join(TARGETS) + " |",
        "|---|" + "---|" * len(TARGETS),
    ]
    rows = [(case.name, lambda target, case=case: compile_case(case, target)) for case in CASES]
    rows.append(("reduction over queries", compile_reduction))
    for name, make in rows:
        cells = []
        for target in TARGETS:
            found = resources(make(target))
            spilled = f", {found['spills']} spilled" if found["spills"] else ""
            cells.append(f"{found['registers']} / {found['shared']:,}{spilled}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    text = table()
    if "--write" in sys.argv:
        page = Path(__file__).resolve().parents[1] / "docs/triton.md"
        begin, end = "<!-- aot -->", "<!-- /aot -->"
        old = page.read_text()
        page.write_text(old[: old.index(begin) + len(begin)] + "\n" + text + "\n" + old[old.index(end) :])
