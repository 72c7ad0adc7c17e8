"""Memory and processor time of a process with all its descendants, from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")


class ProcessTree:
    """A server and the processes it started. Dead ones count no more."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def pss_bytes(self) -> int:
        """Return the proportional set size: what processes share is counted once."""
        total = 0
        for pid in self._pids():
            with suppress(OSError):
                for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1]) * 1024
        return total

    def cpu_s(self) -> float:
        """Return the processor time used so far, in user and kernel mode."""
        total = 0
        for pid in self._pids():
            with suppress(OSError):
                fields = _stat(pid)
                total += int(fields[11]) + int(fields[12])
        return total / _TICKS

    def _pids(self) -> Iterator[int]:
        children: dict[int, list[int]] = {}
        for entry in _PROC.iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    children.setdefault(int(_stat(int(entry.name))[1]), []).append(int(entry.name))
        todo = [self._pid]
        while todo:
            pid = todo.pop()
            yield pid
            todo += children.get(pid, [])


def machine_cpu_s() -> float:
    """Return how long all cores together have been busy since the start of the machine.

    Time that a hypervisor gave to others is not in it.
    """
    user, nice, system, _, _, irq, soft_irq = map(int, _first_line().split()[1:8])
    return (user + nice + system + irq + soft_irq) / _TICKS


def _first_line() -> str:
    with (_PROC / "stat").open() as file:
        return file.readline()


def _stat(pid: int) -> list[str]:
    """Return the fields behind the name, which may hold spaces: state, parent, ..."""
    return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
