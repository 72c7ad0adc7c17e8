"""A bound on the time of work that may never end: programs that users bring, such as templates."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


class TookTooLong(Exception):
    """Raised inside the work, wherever that is."""


def run_within(limit_s: float, work: Callable[[], _T]) -> _T:
    """Return what `work` returns, in this thread; an exception ends it after `limit_s` seconds.

    Python's own loops and calls are ended. One long operation of a C library is not: the exception
    waits for its end.

    Raises:
        TookTooLong: the time was up. Not at once where `work` catches it.
    """
    lock = threading.Lock()
    thread_id = threading.get_ident()
    is_over = False

    def end() -> None:
        with lock:  # nothing that runs here later may be hit
            if not is_over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread_id), ctypes.py_object(TookTooLong)
                )

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        return work()
    except TookTooLong:
        raise TookTooLong(f"it took longer than {limit_s:g} s") from None
    finally:
        with lock:
            is_over = True
        timer.cancel()
