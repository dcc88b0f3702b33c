"""Peak memory of one call, in a process of its own: python _memory.py OP GRANULARITY QUERIES DOCUMENTS TEACHERS THREADS.

Prints JSON: bytes of the inputs, the most that the process held during its first call beyond what it held before (outputs and
the gradient among it), and what it still holds afterwards.
"""

import ctypes
import gc
import json
import resource
import sys

import torch
from _cases import Op, call, make_data
from _rss import reset_peak, status


def main() -> None:
    op = Op(sys.argv[1], sys.argv[2])
    queries, documents, teachers, threads = map(int, sys.argv[3:])
    torch.set_num_threads(threads)
    call(op, make_data(2, 8, teachers))()  # code, tables and threads: once per process, not per call
    data = make_data(queries, documents, teachers)
    run = call(op, data)
    gc.collect()
    try:  # so that nothing the allocator still has hides what the call takes
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        pass
    inputs = data.teachers.nbytes + data.labels.nbytes + (data.student.nbytes if op.name == "pile_loss" else 0)
    if reset_peak():
        before, method = status("VmRSS"), "VmHWM, reset"
        result = run()
        peak, after = status("VmHWM"), status("VmRSS")
    else:  # an earlier peak can hide a later one: a lower bound
        unit = 1 if sys.platform == "darwin" else 1024
        before, method = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "ru_maxrss"
        result = run()
        peak = after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    del result
    print(
        json.dumps({"input_bytes": inputs, "peak_extra_bytes": peak - before, "held_bytes": after - before, "method": method})
    )


if __name__ == "__main__":
    main()
