"""A thread that works beside the engine's steps."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


def start_background_thread(name: str, run: Callable[[], None]) -> threading.Thread:
    """Start `run` in a thread in which torch uses no further threads.

    On two cores a step takes both; a second team of torch's threads would take half of each. Its
    priority is that of all others: a lower one makes loads longer, and steps no shorter (decision
    record 11).
    """
    num_threads = torch.get_num_threads()  # settles the caller's own number before it is changed
    is_settled = threading.Event()

    def start() -> None:
        torch.get_num_threads()  # settles this thread's; later, that would undo the next line
        torch.set_num_threads(1)
        is_settled.set()
        run()

    thread = threading.Thread(target=start, name=name, daemon=True)
    thread.start()
    is_settled.wait()
    # The number is each thread's own, but for threads yet to come it is the one that was set last.
    torch.set_num_threads(num_threads)
    return thread
