"""A child process that the kernel ends with its parent, whatever state it is in.

A closed pipe tells a process to end, but not one that was stopped (SIGSTOP), as that one does not
run until somebody continues it.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Final

log = logging.getLogger(__name__)

#: Of prctl(2): the signal that a process gets when its parent has ended.
_PR_SET_PDEATHSIG: Final = 1


def tethered_process(
    target: Callable[..., object], pipe: Connection, *args: object, name: str, daemon: bool
) -> BaseProcess:
    """Return a process, to be started, that calls `target(pipe, *args)` and ends with its parent.

    Whoever starts it keeps that thread for as long as the process is to live. `target` and `args`
    are unpickled when the process is tethered: that imports torch, which takes seconds, and where
    many do it at once on few cores, minutes.

    Raises:
        Exception: they cannot be pickled.
    """
    work = pickle.dumps((target, args), pickle.HIGHEST_PROTOCOL)
    context = multiprocessing.get_context("spawn")
    return context.Process(target=_run, args=(pipe, work), name=name, daemon=daemon)


def _run(pipe: Connection, work: bytes) -> None:
    _end_with_parent()
    target: Callable[..., object]
    args: tuple[Any, ...]
    target, args = pickle.loads(work)
    target(pipe, *args)


def _end_with_parent() -> None:
    """Have this process killed when the thread that spawned it ends; on Linux, else nothing.

    A process that is stopped before it has come this far ends when it is continued.
    """
    parent = multiprocessing.parent_process()
    if sys.platform != "linux" or parent is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (int(signal.SIGKILL), 0, 0, 0)
    if libc.prctl(_PR_SET_PDEATHSIG, *map(ctypes.c_ulong, arguments)):
        reason = os.strerror(ctypes.get_errno())
        log.warning("if it is stopped, this process may outlive its parent: prctl: %s", reason)
    if os.getppid() != parent.pid:  # it ended before that call
        os._exit(0)
