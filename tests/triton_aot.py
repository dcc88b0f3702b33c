"""Compile the Triton kernels ahead of time for GPUs that are not here, and read what became of them.

What is compiled is what the backend launches: its functions run on tensors without storage, and launches are written down
instead of made. `python tests/triton_aot.py` prints the table of docs/triton.md, `--write` puts it there, `--all` takes every
signature (a quarter of an hour). test_triton.py checks a part.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from pile_fast.backends import triton as backend
from pile_fast.batch import RankingBatch
from pile_fast.options import ensemble_options, loss_options

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: dict  # by name, constants included
    options: dict  # num_warps and such

    @property
    def name(self) -> str:
        kernel, term = self.kernel.fn.__name__.removesuffix("_kernel"), self.arguments.get("TERM")
        return kernel if term is None else term.key if kernel == "term" else f"{kernel} for {term.key}"

    @property
    def key(self) -> tuple:
        return self.name, str(self.signature()), tuple(self.options.items())

    def signature(self) -> dict:
        constants = {p.name for p in self.kernel.params if p.is_constexpr}
        return {name: value if name in constants else _type(value) for name, value in self.arguments.items()}

    def compile(self, target: str):
        arguments = self.arguments
        if target.startswith("gfx") and "how" in arguments:  # an instruction of NVIDIA's
            arguments = arguments | dict(how=arguments["how"]._replace(APPROX=False))
        options = {k: v for k, v in self.options.items() if k != "maxnreg" or target.startswith("sm")}
        signature, constants, attributes = {}, {}, {}
        for number, parameter in enumerate(self.kernel.params):
            value = arguments[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[(number,)] = "constexpr", value
                continue
            signature[parameter.name] = _type(value)
            for path, leaf in _leaves((number,), value):
                if leaf is None:
                    constants[path] = None
                elif isinstance(leaf, torch.Tensor):
                    attributes[path] = [["tt.divisibility", 16]]
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)
        return triton.compile(source, target=TARGETS[target], options=options)


def _leaves(path: tuple[int, ...], value):
    """What a value consists of, and where."""
    if not isinstance(value, tuple):
        yield path, value
        return
    for number, part in enumerate(value):
        yield from _leaves((*path, number), part)


def _type(value):
    if isinstance(value, tuple):
        parts = map(_type, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if value is None:
        return "constexpr"
    if isinstance(value, torch.Tensor):
        names = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}
        return "*" + names.get(value.dtype, str(value.dtype).removeprefix("torch.").replace("uint", "u").replace("int", "i"))
    return "fp32" if isinstance(value, float) else "i32"


def launches(call: Callable) -> list[Launch]:
    """What a call launches, each kernel once per signature."""
    found = {}

    def record(kernel, grid):
        def run(*arguments, **named):
            options = {k: named.pop(k) for k in ("num_warps", "enable_fp_fusion", "maxnreg") if k in named}
            names = [p.name for p in kernel.params]
            launch = Launch(kernel, dict(zip(names, arguments, strict=False)) | named, options)
            assert set(launch.arguments) == set(names), set(launch.arguments) ^ set(names)
            found.setdefault(launch.key, launch)

        return run

    with mock.patch.object(JITFunction, "__getitem__", record):
        call()
    return list(found.values())


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def pile_loss(
    shape, *, packed=0, masked=False, dtype=torch.float32, labels=torch.float32, prior=False, alpha=1.0, pairwise="direct",
    pair_weight=None, granularity="document", normalize="zscore", margin=0.0, reduction="mean", pulls=False,
):  # fmt: skip
    *documents, teachers = shape
    batch = RankingBatch(
        student_logits=tensor(*documents, dtype=dtype), teacher_logits=tensor(*shape, dtype=dtype),
        labels=tensor(*documents, dtype=labels), prior=tensor(teachers, dtype=torch.float64) if prior else None,
        mask=tensor(*documents, dtype=torch.bool) if masked else None,
        cu_seqlens=tensor(packed + 1, dtype=torch.int32) if packed else None,
    )  # fmt: skip
    ensemble = ensemble_options(
        iterations=0 if granularity == "shared" else 2, granularity=granularity, normalize=normalize, margin=margin,
        pair_weight=pair_weight, pairwise=pairwise,
    )  # fmt: skip
    loss = loss_options(alpha=alpha, pair_weight=pair_weight, reduction=reduction, pairwise=pairwise)
    backend.pile_loss(batch, ensemble, loss, True, pulls)


def pulls(shape, *, pairwise="direct", normalize="zscore"):
    batch = RankingBatch(
        teacher_logits=tensor(*shape), labels=tensor(*shape[:-1]), prior=tensor(shape[-1], dtype=torch.float64)
    )
    backend.pulls(batch, ensemble_options(pairwise=pairwise, normalize=normalize))


def pile_ensemble(
    shape, *, packed=0, dtype=torch.float32, pair_weight=None, granularity="document", pairwise="direct", more=False
):  # fmt: skip
    batch = RankingBatch(
        teacher_logits=tensor(*shape, dtype=dtype), labels=tensor(*shape[:-1]),
        cu_seqlens=tensor(packed + 1, dtype=torch.int64) if packed else None,
    )  # fmt: skip
    backend.ensemble(
        batch, ensemble_options(iterations=2, granularity=granularity, pair_weight=pair_weight, pairwise=pairwise), more, more
    )


def pair_loss(shape, *, alpha, distillation="logistic", label_loss="logistic", pairwise="direct", weights=False, **options):
    batch = RankingBatch(
        student_logits=tensor(*shape), target_logits=tensor(*shape), labels=tensor(*shape),
        weights=tensor(*shape) if weights else None, query_weights=tensor(shape[0]) if weights else None,
    )  # fmt: skip
    of_loss = loss_options(alpha=alpha, distillation=distillation, label_loss=label_loss, pairwise=pairwise, **options)
    backend.pair_loss(batch, of_loss, True)


def no_reduction(call, *arguments, **options):
    return lambda: call(*arguments, reduction="none", **options)


FUSED = {
    "pile_loss, 32 documents": no_reduction(pile_loss, (256, 32, 4)),
    "pile_loss, 64 documents": no_reduction(pile_loss, (256, 64, 4)),
    "pile_loss, 128 documents": no_reduction(pile_loss, (256, 128, 4)),
    "pile_loss, 128 documents, 8 teachers": no_reduction(pile_loss, (256, 128, 8)),
    "pile_loss, by query, label gaps, margin, alpha 0.5, masked, bf16, int64 labels": no_reduction(
        pile_loss, (256, 128, 4), masked=True, dtype=torch.bfloat16, labels=torch.int64, prior=True, alpha=0.5,
        pair_weight="label_gap", granularity="query", margin=0.3,
    ),
    "pile_ensemble, packed, weights, trace, fp16, 16 teachers": lambda: pile_ensemble(
        (2048, 16), packed=64, dtype=torch.float16, pair_weight="gain_gap", more=True
    ),
    "pile_ensemble, 128 teachers": lambda: pile_ensemble((256, 128, 128)),
    "pile_loss, shared weights": no_reduction(pile_loss, (256, 128, 4), granularity="shared", prior=True),
    "pile_loss, shared weights, 8 teachers, with pulls": no_reduction(
        pile_loss, (256, 128, 8), granularity="shared", prior=True, pulls=True
    ),
    "pulls of shared weights, probabilities": lambda: pulls((256, 128, 4), normalize="logit"),
    "mean squared differences": lambda: pair_loss((256, 128), alpha=1.0, distillation="mse"),
    "ranking_loss": no_reduction(pair_loss, (256, 128), alpha=0.0),
    "kl": no_reduction(pair_loss, (256, 128), alpha=1.0, distillation="kl"),
    "softmax": no_reduction(pair_loss, (256, 128), alpha=0.0, label_loss="softmax"),
    "lambdarank": no_reduction(pair_loss, (256, 128), alpha=0.0, label_loss="lambdarank"),
    "approx_ndcg": no_reduction(pair_loss, (256, 128), alpha=0.0, label_loss="approx_ndcg"),
    "distillation and ranking, weights": no_reduction(pair_loss, (256, 128), alpha=0.5, weights=True),
    "kl and lambdarank, weights": no_reduction(
        pair_loss, (256, 128), alpha=0.5, distillation="kl", label_loss="lambdarank", weights=True
    ),
}  # fmt: skip
LONG = {
    "packed, in linear time": lambda: pile_loss((1 << 20, 8), packed=64, alpha=0.5, pairwise="chebyshev"),
    "by query, weighted, margin, masked": lambda: pile_loss(
        (4, 40_000, 4), masked=True, dtype=torch.bfloat16, labels=torch.int64, alpha=0.5, pairwise="chebyshev",
        pair_weight="label_gap", granularity="query", margin=0.3,
    ),
    "trace, weights, 16 teachers": lambda: pile_ensemble((4, 2000, 16), pairwise="chebyshev", more=True),
    "direct": lambda: pile_loss((16, 1000, 8), alpha=0.5),
    "shared": lambda: pile_loss((1 << 20, 8), packed=64, granularity="shared", prior=True, pairwise="chebyshev"),
    "shared, with pulls": lambda: pile_loss(
        (1 << 20, 8), packed=64, granularity="shared", prior=True, pulls=True, pairwise="chebyshev"
    ),
    "pulls": lambda: pulls((4, 40_000, 8), normalize="logit", pairwise="chebyshev"),
    "direct, kl and lambdarank": lambda: pair_loss((16, 1000), alpha=0.5, distillation="kl", label_loss="lambdarank"),
    "direct, softmax, weights": lambda: pair_loss((16, 1000), alpha=0.5, label_loss="softmax", weights=True),
    "direct, approx_ndcg": lambda: pair_loss((16, 1000), alpha=0.0, label_loss="approx_ndcg"),
    "direct, weights": lambda: pair_loss((16, 1000), alpha=0.0, weights=True),
    "weights": lambda: pair_loss((4, 40_000), alpha=0.5, pairwise="chebyshev", weights=True),
    "direct, packed, by query, 128 teachers": lambda: pile_ensemble((6000, 128), packed=3, granularity="query", more=True),
}  # fmt: skip


def cases() -> dict[str, Launch]:
    """Every kernel with every signature, by a name of its own."""
    found, known = {}, set()
    for name, call in FUSED.items():
        for launch in launches(call):
            if launch.key not in known:
                found[name if launch.name == "pile" else "reduction over queries"] = launch
                known.add(launch.key)
    for name, call in LONG.items():
        for launch in launches(call):
            if launch.key not in known:
                found.setdefault(f"{name}: {launch.name}", launch)
                known.add(launch.key)
    return found


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


def in_table(name: str) -> bool:
    """The one-launch kernels, and of the long lists' those of the first call."""
    return ":" not in name or name.startswith(next(iter(LONG)))


def table(everything: bool) -> str:
    lines = [
        f"Triton {triton.__version__}; registers per thread / bytes of shared memory.",
        "",
        "| kernel | " + " | ".join(TARGETS) + " |",
        "|---|" + "---|" * len(TARGETS),
    ]
    for name, launch in cases().items():
        if not (everything or in_table(name)):
            continue
        cells = []
        for target in TARGETS:
            found = resources(launch.compile(target))
            spilled = f", {found['spills']} spilled" if found["spills"] else ""
            cells.append(f"{found['registers']} / {found['shared']:,}{spilled}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    text = table("--all" in sys.argv)
    if "--write" in sys.argv:
        page = Path(__file__).resolve().parents[1] / "docs/triton.md"
        begin, end = "<!-- aot -->", "<!-- /aot -->"
        old = page.read_text()
        page.write_text(old[: old.index(begin) + len(begin)] + "\n" + text + "\n" + old[old.index(end) :])
