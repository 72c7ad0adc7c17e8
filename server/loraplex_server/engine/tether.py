"""A child process that the kernel ends with its parent, whatever state it is in.

A closed pipe tells a process to end, but not one that was stopped (SIGSTOP), as that one does not
run until somebody continues it.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
from typing import Final

log = logging.getLogger(__name__)

#: Of prctl(2): the signal that a process gets when its parent has ended.
_PR_SET_PDEATHSIG: Final = 1


def end_with_parent() -> None:
    """Have this process killed when the thread that spawned it ends; on Linux, else nothing.

    To be called first of all in a process of multiprocessing. Whoever spawns it keeps that thread
    for as long as the process is to live. A process that is stopped before it has come this far
    ends when it is continued.
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
