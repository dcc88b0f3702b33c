"""One provider on one problem, in a process (and an environment) of its own: compare.py starts it.

    python worker.py FILE VARIANT OP LISTS.npz GRADIENT.npy LIMIT_BYTES

Answers line by line, as JSON: an empty line with what the first call gave, each "REPEATS BATCH WARM" with the seconds that
calls took, after WARM seconds of calls that do not count.
"""

import ctypes
import gc
import importlib.util
import json
import os
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from problem import Lists, make_lists

sys.path.append(str(Path(__file__).parents[1]))
from _rss import reset_peak, status  # noqa: E402
from _turn import take_times  # noqa: E402


def start(file: str, variant: str, op: str, lists: str, gradient: str, limit: int):
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    provider = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(provider)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # Code, tables, threads: once per process. Nothing of that outlasts a compilation.
    small = make_lists([3, 5] if provider.RAGGED else [4, 4])
    provider.prepare(op, small, variant.replace("torch.compile", "eager"))()
    if not sys.stdin.readline():  # all start at once, but make their first calls one after the other
        sys.exit("compare.py ended")
    with np.load(lists) as arrays:
        problem = Lists(*(arrays[name] for name in Lists._fields))
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + limit, -1))
    run = provider.prepare(op, problem, variant)
    gc.collect()
    try:  # so that nothing the allocator still has hides what the call takes
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        pass
    before = status("VmRSS") if reset_peak() else None
    begin = time.perf_counter()
    loss, grad = run()
    seconds = time.perf_counter() - begin
    peak = None if before is None else status("VmHWM") - before
    np.save(gradient, np.asarray(grad.float() if str(grad.dtype) == "torch.bfloat16" else grad))  # NumPy has none
    answer = {"loss": float(loss), "seconds": seconds, "peak_extra_bytes": peak, "version": version(provider.PACKAGE)}
    return run, answer | {"scale": provider.SCALES[op]}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is not an answer
    try:
        run, answer = start(*sys.argv[1:-1], int(sys.argv[-1]))
    except Exception as error:
        out_of_memory = isinstance(error, MemoryError) or any(text in str(error).lower() for text in ("alloc", "memory"))
        kind = "out of memory" if out_of_memory else f"failed: {type(error).__name__}"
        print(json.dumps({"failure": f"{kind}: {next(iter(str(error).splitlines()), '')[:200]}"}), file=answers)
        return
    print(json.dumps(answer), file=answers)
    gc.disable()
    for line in sys.stdin:
        repeats, batch, warm = line.split()
        print(json.dumps(take_times(run, int(repeats), int(batch), float(warm))), file=answers)


if __name__ == "__main__":
    main()
