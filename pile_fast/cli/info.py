"""``pile-fast info``: versions, devices, and which backends work here."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch

import pile_fast
from pile_fast.backends import cpp

_OPTIONAL = ("transformers", "accelerate", "datasets", "scikit-learn")


def add_parser(commands: argparse._SubParsersAction) -> None:
    commands.add_parser("info", help="versions, devices, and which backends work here").set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    rows = [
        ("pile_fast", pile_fast.__version__),
        ("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})"),
        ("torch", torch.__version__),
        *((name, _version(name)) for name in _OPTIONAL),
        ("threads", _threads()),
        ("devices", ", ".join(_devices())),
    ]
    for name, status in pile_fast.available_backends().items():
        state = f"works ({', '.join(status.devices) or 'any device'})" if status.available else f"no: {status.reason}"
        rows.append((f"backend {name}", state))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed (pip install 'pile_fast[train]')"


def _threads() -> str:
    threads = torch.get_num_threads()
    if cpp.unavailable() or threads == cpp.threads():
        return str(threads)
    return f"{threads}, but one for backend cpp: PyTorch has no OpenMP runtime here, or this process is a fork"


def _devices() -> list[str]:
    devices = ["cpu"]
    devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return devices + (["mps"] if torch.backends.mps.is_available() else [])
