"""A background thread has no helpers of torch's, and nobody else is affected."""

from __future__ import annotations

import os
import sys
import threading

import pytest
import torch

from loraplex_server.background import run_in_background, start_background_thread


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


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has no priority of its own")
def test_its_priority_is_the_one_asked_for_and_that_of_others_stays():
    def priority():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before, found = priority(), []
    for niceness in (0, 3):
        start_background_thread("test", lambda: found.append(priority()), niceness=niceness).join()
    assert found == [before, before + 3]
    assert run_in_background("test", priority) > before
    assert priority() == before


@pytest.mark.usefixtures("_two_threads")
def test_what_is_run_there_returns_and_raises_here():
    assert run_in_background("test", torch.get_num_threads) == 1
    assert run_in_background("test", threading.get_native_id) != threading.get_native_id()
    with pytest.raises(ZeroDivisionError):
        run_in_background("test", lambda: 1 / 0)
