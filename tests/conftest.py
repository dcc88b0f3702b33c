"""Fixtures that more than one test file uses."""

import pytest
import torch

from pile_fast.data import find_data


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def mq2008_folder():
    folder = find_data("mq2008")
    if folder is None or not (folder / "mq2008").is_dir():
        pytest.skip("needs the MQ2008 files: set PILE_FAST_DATA to the folder that holds mq2008/ and mq2008_agg/")
    return folder


@pytest.fixture
def poisoned(monkeypatch):
    """What torch.empty and its kin return is NaN first: an output element that a kernel does not write shows."""

    def poison(tensor):
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


@pytest.fixture
def one_thread():
    """For tiny networks: on a busy machine their threads would mostly wait for each other. Undoes what the demo sets, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
