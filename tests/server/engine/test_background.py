"""A background thread has no helpers of torch's, and nobody else is affected."""

from __future__ import annotations

import threading

import pytest
import torch

from loraplex_server.engine.background import start_background_thread


def torch_threads_elsewhere() -> int:
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_torch_computes_with_one_thread_there_and_with_as_many_as_ever_elsewhere():
    found = []

    def run():
        torch.ones(1 << 20).add_(1)  # large enough to be shared out
        found.append(torch.get_num_threads())

    start_background_thread("test", run).join()
    assert found == [1]
    assert torch.get_num_threads() == 2
    assert torch_threads_elsewhere() == 2
