"""What this process may use of the machine: memory and processors, containers considered.

Control groups are read in both versions. A limit may be set at any level above the process, so the
tightest of all levels counts. In a container the groups' own root is what shows at the mount.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

#: Where nothing can be told.
_UNKNOWN_BYTES = 4 << 30


def available_bytes(root: Path = Path("/")) -> int:
    """Return the memory that could be used now, in bytes; `root` is where /proc and /sys are."""
    lines = _read(root / "proc/meminfo").splitlines()
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return max(0, min([*free, *_free_in_groups(root)], default=_UNKNOWN_BYTES))


def num_processors(root: Path = Path("/")) -> int:
    """Return how many threads can compute at once: affinity and quota, rounded down."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(1, int(min([float(count), *_quotas(root)])))


def _free_in_groups(root: Path) -> Iterator[int]:
    """Yield limit minus use of every level; files that are merely cached are not in use."""
    for folder in _group_folders(root, ""):
        yield from _free_in(folder, "memory.max", "memory.current", "inactive_file")
    for folder in _group_folders(root, "memory"):
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        yield from _free_in(folder, *names)


def _free_in(folder: Path, limit_name: str, usage_name: str, cached_name: str) -> Iterator[int]:
    limit, usage = _read(folder / limit_name), _read(folder / usage_name)
    if limit.isdigit() and usage.isdigit():
        stat = dict(line.split(maxsplit=1) for line in _read(folder / "memory.stat").splitlines())
        yield int(limit) - int(usage) + int(stat.get(cached_name, 0))


def _quotas(root: Path) -> Iterator[float]:
    """Yield the processors that every level with a quota allows."""
    for folder in _group_folders(root, ""):
        yield from _quota(*_read(folder / "cpu.max").split())
    for folder in _group_folders(root, "cpu"):
        yield from _quota(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _quota(quota_us: str = "", period_us: str = "") -> Iterator[float]:
    """Yield the quota as a number of processors; nothing where it is `max`, -1 or absent."""
    if quota_us.isdigit() and period_us.isdigit() and int(period_us):
        yield int(quota_us) / int(period_us)


def _group_folders(root: Path, controller: str) -> Iterator[Path]:
    """Yield the process's group and all above it; `controller` is empty for version 2."""
    mount = root / "sys/fs/cgroup" / controller
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", maxsplit=2)
        if controller in controllers.split(","):
            group = mount / path.strip("/")
            yield from (f for f in (group, *group.parents) if f.is_relative_to(mount))


def _read(path: Path) -> str:
    """Return the text of a file of the kernel's, empty where there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
