"""A process's resident memory and its peak, as Linux counts them."""


def status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def reset_peak() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return status("VmHWM") <= status("VmRSS") + 2**20
    except (OSError, StopIteration):
        return False
