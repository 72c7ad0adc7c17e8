"""Processes as the kernel tells of them."""

from __future__ import annotations

import time
from pathlib import Path


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not.

    One whose parent has died may stay a zombie: not every first process of a container reaps those
    that it inherits.
    """
    return _state_and_parent(pid)[0] not in ("", "Z")


def wait_until_dead(pid: int, timeout_s: float = 20.0) -> None:
    """Wait until the process does not run."""
    deadline = time.monotonic() + timeout_s
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    """Return the ids of the processes that this one started and that still run, oldest first."""
    found = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return sorted(i for i in found if _state_and_parent(i)[1] == pid and is_alive(i))


def largest_child_of(pid: int) -> int:
    """Return the id of the child that holds the most memory; multiprocessing has small ones."""
    return max(children_of(pid), key=resident_pages)


def resident_pages(pid: int) -> int:
    """Return how many of the system's pages the process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


def _state_and_parent(pid: int) -> tuple[str, int]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "", 0
    state, parent = text.rpartition(")")[2].split()[:2]
    return state, int(parent)
