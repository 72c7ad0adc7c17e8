"""Whether a server could run on this machine. Reads, and imports nothing of the server."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from loraplex.cli.doctor.finding import Finding, fail, note, ok

_MIN_PYTHON = (3, 11)
_SERVER_PACKAGES = ("torch", "transformers", "safetensors", "numpy", "fastapi", "uvicorn")
_MIN_MEMORY_BYTES = 2 << 30
_MIN_DISK_BYTES = 1 << 30
_COMPILERS = ("cc", "gcc", "clang")

# In a process of its own: importing torch takes seconds, and a broken one may end its process.
_ASK_TORCH = """
import json, torch
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "is_available": torch.cuda.is_available(),
    "devices": [[d.name, d.total_memory, d.major, d.minor] for d in devices],
    "cpu": torch.backends.cpu.get_cpu_capability(),
}))
"""
_TORCH_TIMEOUT_S = 120.0


def check_machine(data_dir: Path) -> Iterator[Finding]:
    """Yield what was found, quick checks first."""
    yield check_python(sys.version_info[:3])
    packages = check_packages()
    yield packages
    if not packages.advice:
        yield from check_torch()
    yield check_compiler()
    yield check_memory()
    yield from check_data_dir(data_dir)


def check_python(version: tuple[int, ...]) -> Finding:
    """Check the version of Python."""
    told = ".".join(map(str, version))
    if version < _MIN_PYTHON:
        return fail("python", told, "loraplex needs Python 3.11 or later")
    return ok("python", f"{told} on {platform.system()} {platform.machine()}")


def check_packages() -> Finding:
    """Check that the server is installed; a client needs none of it."""
    missing = [name for name in ("loraplex_server", *_SERVER_PACKAGES) if find_spec(name) is None]
    if missing:
        return note(
            "packages",
            f"no server here (no {', '.join(missing)}); fine on a machine that only asks one",
            "to serve from here: pip install 'loraplex[server]'",
        )
    versions = (f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    return ok("packages", f"server installed, {', '.join(versions)}")


def check_torch() -> Iterator[Finding]:
    """Check that torch can be imported, and what it can compute on."""
    command = [sys.executable, "-c", _ASK_TORCH]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TORCH_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        yield fail("torch", "did not load in two minutes", "see whether the disk or the GPU hangs")
        return
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        yield fail("torch", lines[-1], "install torch again, for this Python and this GPU's driver")
        return
    found: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
    yield from judge_devices(found, has_triton=find_spec("triton") is not None)


def judge_devices(found: Mapping[str, Any], *, has_triton: bool) -> Iterator[Finding]:
    """Judge what torch told of its devices."""
    if not found["is_available"]:
        told = f"none; the CPU computes ({found['cpu']})"
        has_driver = shutil.which("nvidia-smi") is not None
        if has_driver and not found["cuda"]:
            advice = "this torch is built for CPUs: install one for CUDA, see pytorch.org"
        elif has_driver:
            advice = "see whether `nvidia-smi` works and its driver is new enough for this torch"
        else:
            advice = "nothing, if there is none; docs/benchmarks/cpu.md has figures without"
        yield note("gpu", told, advice)
    for name, memory, major, minor in found["devices"]:
        told = f"{name}, {decimal(memory)}, compute capability {major}.{minor}"
        if major < 8:
            yield fail("gpu", told, "kernels need 8.0 (Ampere) or later: serve with --device cpu")
        else:
            yield ok("gpu", told)
    if found["is_available"] and not has_triton:
        yield fail("triton", "not installed", "the GPU's kernels need it: pip install triton")


def check_compiler() -> Finding:
    """Check that the CPU's kernels can be compiled."""
    found = next((path for name in _COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        return note(
            "compiler",
            f"none of {', '.join(_COMPILERS)}",
            "a CPU is several times as fast with one: install gcc (a GPU does not need it)",
        )
    return ok("compiler", found)


def check_memory() -> Finding:
    """Check the memory that is free."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free = max(free, _available_bytes(Path("/proc/meminfo")))
    except (OSError, ValueError):
        return note("memory", "this system does not tell", "see that some GiB are free")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    told = f"{decimal(free)} available, {cores} cores"
    if free < _MIN_MEMORY_BYTES:
        return note("memory", told, "stop other programs, or set --pool-bytes and --host-bytes")
    return ok("memory", told)


def check_data_dir(folder: Path) -> Iterator[Finding]:
    """Check that adapters can be kept; makes nothing that stays."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    advice = f"let this user write there (chown, chmod), or choose another --data-dir than {folder}"
    if not existing.is_dir():
        yield fail("data folder", f"{existing} is no folder", advice)
        return
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        yield fail("data folder", f"{existing}: {error.strerror or error}", advice)
        return
    free = shutil.disk_usage(existing).free
    will = "" if existing == folder else " (will be made)"
    told = f"{folder}{will}, {decimal(free)} free"
    if free < _MIN_DISK_BYTES:
        yield note("data folder", told, "make room, or choose another disk with --data-dir")
    else:
        yield ok("data folder", told)


def _available_bytes(meminfo: Path) -> int:
    """Return what Linux could give without swapping; caches count, unlike in `sysconf`."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
