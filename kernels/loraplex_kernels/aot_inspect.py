"""What a compiled kernel uses, read from its cubin and from the LLVM IR it was made of.

The cubin says what the chip will allocate: registers, stack, local memory (spills), shared memory.
The IR says which argument each global load reads, which machine code no longer does.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton

#: The widest load of a thread on sm_80 and sm_90; narrower ones keep fewer bytes in flight.
WIDE_BYTES = 16

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_SPILL = re.compile(r"\b(?:LDL|STL)\b")
_MMA = re.compile(r"\b(HGMMA|HMMA|UTCHMMA)\b")
_POINTER = re.compile(r"ptr addrspace\(1\) (%[\w.]+)")
_LOAD = re.compile(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[busf](\d+)")
_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global[^;\"]*?(?:, (0x[0-9a-f]+|\d+)|\.(\d+)\()")
_LLVM_LOAD = re.compile(r"= load (?:volatile )?(?:<(\d+) x )?(?:i|float|half|bfloat)(\d*)")
_INCOMING = re.compile(r"\[ (%[\w.]+), %[\w.]+ \]")  # of a phi
_SENT = re.compile(r"= ptrtoint ptr addrspace\(1\) (%[\w.]+)")
_RECEIVED = re.compile(r"^\s*(%[\w.]+) = inttoptr\b")
_DERIVED = re.compile(r"^\s*(%[\w.]+) = (?:getelementptr|select|phi|freeze|bitcast)\b")


class AotToolError(RuntimeError):
    """The triton wheel lacks a tool or a target that the inspection needs."""


@dataclass(frozen=True)
class CubinUsage:
    """What the chip allocates for one program; the largest over a cubin's functions."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    local_bytes: int
    spill_instructions: int
    mma: str


def read_usage(cubin: bytes) -> CubinUsage:
    """Read registers, stack, static shared memory, spills and the kind of matrix instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    rows = [tuple(map(int, match)) for match in _USAGE.findall(usage)]
    if not rows:
        raise AotToolError(f"cuobjdump printed no resource usage: {usage!r}")
    registers, stack, shared, local = (max(column) for column in zip(*rows, strict=True))
    mma = _MMA.search(sass)
    spills = len(_SPILL.findall(sass))
    return CubinUsage(registers, stack, shared, local, spills, mma[1] if mma else "")


def cuobjdump_path() -> Path:
    """Return the disassembler that the triton wheel carries."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not path.exists():
        raise AotToolError(f"triton {triton.__version__} carries no {path}; install its CUDA wheel")
    return path


def _cuobjdump(flag: str, path: str) -> str:
    done = subprocess.run([cuobjdump_path(), flag, path], capture_output=True, text=True)
    if done.returncode:
        raise AotToolError(f"cuobjdump {flag} failed: {done.stderr.strip()}")
    return done.stdout


def load_widths(llir: str, arguments: tuple[str, ...]) -> dict[str, list[int]]:
    """Return the bytes per thread of every global load, by the kernel argument it reads.

    Args:
        llir: LLVM IR of the kernel, everything inlined, as Triton leaves it.
        arguments: names of the kernel's run-time arguments, in order.

    Returns:
        Widths by argument. Under `"tma"` one 16 for each bulk copy, which names no pointer; under
        `"?"` loads through a pointer that no argument could be found for.
    """
    lines = llir.splitlines()
    parents = {
        match[1]: _POINTER.findall(line) + _INCOMING.findall(line)
        for line in lines
        if (match := _DERIVED.match(line))
    }
    # A layout change takes pointers through shared memory or shuffles as integers: one that comes
    # back may be any that went.
    sent = [match[1] for line in lines if (match := _SENT.search(line))]
    parents |= {match[1]: sent for line in lines if (match := _RECEIVED.match(line))}
    header = next(line for line in lines if line.startswith("define") and "_kernel void" in line)
    roots = dict(zip(re.findall(r"%[\w.]+", header.partition("(")[2]), arguments, strict=False))
    widths: dict[str, list[int]] = {}
    for line in lines:
        if "cp.async.bulk.tensor" in line and "global" in line:
            widths.setdefault("tma", []).append(WIDE_BYTES)
        for pointer, width in _loads(line):
            for argument in _trace(pointer, parents, roots):
                widths.setdefault(argument, []).append(width)
    return widths


def _loads(line: str) -> Iterator[tuple[str, int]]:
    """Yield pointer and bytes of each global load of one line of IR."""
    pointer = _POINTER.search(line.rpartition('"')[2] if "asm" in line else line)
    if pointer is None:
        return
    if match := _LOAD.search(line):
        yield pointer[1], int(match[1] or 1) * int(match[2]) // 8
    elif match := _COPY.search(line):
        yield pointer[1], int(match[1] or match[2], 0)
    elif match := _LLVM_LOAD.search(line):
        yield pointer[1], int(match[1] or 1) * int(match[2] or 32) // 8


def _trace(pointer: str, parents: dict[str, list[str]], roots: dict[str, str]) -> set[str]:
    """Follow a pointer up to the arguments it was computed from."""
    found, seen, queue = set(), set(), [pointer]
    while queue:
        name = queue.pop()
        if name in roots:
            found.add(roots[name])
        elif name not in seen:
            seen.add(name)
            queue += parents.get(name, [])
    return found or {"?"}
