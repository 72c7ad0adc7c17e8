"""What containers leave of a machine, over folders that look like /proc and /sys."""

from __future__ import annotations

import os

import pytest

from loraplex_server.machine import available_bytes, num_processors

GIB = 1 << 30


@pytest.fixture
def write(tmp_path):
    """Return a function that writes files below the fake root, by path."""

    def write(files):
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(f"{text}\n")
        return tmp_path

    return write


def meminfo(num_bytes):
    return f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable: {num_bytes // 1024} kB"


def test_without_groups_the_machine_counts(write):
    root = write({"proc/meminfo": meminfo(3 * GIB)})
    assert available_bytes(root) == 3 * GIB
    assert num_processors(root) == len(os.sched_getaffinity(0))


def test_where_nothing_can_be_told_there_is_a_default(tmp_path):
    assert available_bytes(tmp_path) == 4 * GIB


@pytest.mark.parametrize("path", ["/", "/pod/box"], ids=["own root", "seen from the host"])
def test_version_2_limits_leave_what_is_not_in_use(write, path):
    group = f"sys/fs/cgroup{path.rstrip('/')}"
    root = write(
        {
            "proc/meminfo": meminfo(64 * GIB),
            "proc/self/cgroup": f"0::{path}",
            f"{group}/memory.max": 8 * GIB,
            f"{group}/memory.current": 5 * GIB,
            f"{group}/memory.stat": f"anon 1\ninactive_file {GIB}",
            f"{group}/cpu.max": "150000 100000",
        }
    )
    assert available_bytes(root) == 4 * GIB
    assert num_processors(root) == 1


def test_the_tightest_level_counts(write):
    root = write(
        {
            "proc/meminfo": meminfo(64 * GIB),
            "proc/self/cgroup": "0::/pod/box",
            "sys/fs/cgroup/pod/box/memory.max": "max",
            "sys/fs/cgroup/pod/box/memory.current": GIB,
            "sys/fs/cgroup/pod/box/cpu.max": "max 100000",
            "sys/fs/cgroup/pod/memory.max": 3 * GIB,
            "sys/fs/cgroup/pod/memory.current": GIB,
            "sys/fs/cgroup/pod/cpu.max": "50000 100000",
        }
    )
    assert available_bytes(root) == 2 * GIB
    assert num_processors(root) == 1


def test_the_machine_may_have_less_than_the_limit(write):
    root = write(
        {
            "proc/meminfo": meminfo(GIB),
            "proc/self/cgroup": "0::/",
            "sys/fs/cgroup/memory.max": 8 * GIB,
            "sys/fs/cgroup/memory.current": 0,
            "sys/fs/cgroup/cpu.max": "99900000 100000",
        }
    )
    assert available_bytes(root) == GIB
    assert num_processors(root) == len(os.sched_getaffinity(0))


def test_a_limit_that_is_exceeded_leaves_nothing(write):
    root = write(
        {
            "proc/self/cgroup": "0::/",
            "sys/fs/cgroup/memory.max": GIB,
            "sys/fs/cgroup/memory.current": GIB + 4096,
        }
    )
    assert available_bytes(root) == 0


def test_version_1_limits_count_where_the_container_sees_its_group_as_the_root(write):
    root = write(
        {
            "proc/meminfo": meminfo(64 * GIB),
            "proc/self/cgroup": "4:memory:/docker/box\n2:cpu,cpuacct:/docker/box\n1:name=systemd:/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 2 * GIB,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": GIB,
            "sys/fs/cgroup/memory/memory.stat": f"cache 5\ntotal_inactive_file {GIB // 2}",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": 100000,
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
        }
    )
    assert available_bytes(root) == 3 * GIB // 2
    assert num_processors(root) == 1


def test_version_1_without_limits_changes_nothing(write):
    root = write(
        {
            "proc/meminfo": meminfo(5 * GIB),
            "proc/self/cgroup": "4:memory:/\n2:cpu:/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": GIB,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1,
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
        }
    )
    assert available_bytes(root) == 5 * GIB
    assert num_processors(root) == len(os.sched_getaffinity(0))
