"""Threads that work beside the engine's steps."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, TypeVar

import torch

_T = TypeVar("_T")

#: Of long work that nobody's tokens wait for, on the scale from 0 to 19: a tenth of a core where
#: the steps take all of them.
_NICENESS: Final = 10


def start_background_thread(
    name: str, run: Callable[[], None], *, niceness: int = 0
) -> threading.Thread:
    """Start `run` in a thread in which torch uses no further threads.

    On two cores a step takes both; a second team of torch's threads would take half of each. A
    lower priority makes loads of adapters longer, and steps no shorter (decision record 11): it is
    for other work.
    """
    num_threads = torch.get_num_threads()  # settles the caller's own number before it is changed
    is_settled = threading.Event()

    def start() -> None:
        torch.get_num_threads()  # settles this thread's; later, that would undo the next line
        torch.set_num_threads(1)
        is_settled.set()
        if niceness and sys.platform == "linux":  # where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
        run()

    thread = threading.Thread(target=start, name=name, daemon=True)
    thread.start()
    is_settled.wait()
    # The number is each thread's own, but for threads yet to come it is the one that was set last.
    torch.set_num_threads(num_threads)
    return thread


def run_in_background(name: str, work: Callable[[], _T]) -> _T:
    """Run `work` in such a thread of low priority, wait, and return or raise what it does.

    For long work of threads that others share: a priority once lowered cannot be raised again.
    """
    result: Future[_T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # noqa: BLE001  # the caller raises it
            result.set_exception(error)

    start_background_thread(name, run, niceness=_NICENESS)
    return result.result()
