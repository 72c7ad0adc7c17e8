"""Int32 tables at fixed device addresses, filled anew each step by asynchronous copies.

A CUDA graph keeps the addresses it was captured with. So each table has one place for the life of
the engine, larger than most steps need, and only the part that a step fills is copied.

The host writes into a pinned mirror, from which the copy runs while the host goes on. Two mirrors
take turns: one step may be under way while the next is laid out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

#: Tables up to this length lie side by side and travel in one copy, filled or not.
_SMALL: Final = 4096

#: Elements; keeps every table's start aligned to 64 bytes.
_ALIGNMENT: Final = 16

_NUM_MIRRORS: Final = 2


def copy_tables(
    arrays: Sequence[npt.NDArray[np.int32]], device: torch.device
) -> list[torch.Tensor]:
    """Copy arrays to `device` in one transfer, for a step that brings tables of its own.

    Each starts aligned: for a pointer that is not, Triton compiles the kernel again, while serving.
    """
    starts = [0, *accumulate(-(-a.size // _ALIGNMENT) * _ALIGNMENT for a in arrays)]
    flat = np.zeros(starts[-1], dtype=np.int32)
    for start, array in zip(starts, arrays, strict=False):
        flat[start : start + array.size] = array.reshape(-1)
    host = torch.from_numpy(flat)
    if device.type == "cuda":
        # From pageable memory the copy would wait for everything enqueued before it.
        host = host.pin_memory()
    data = host.to(device, non_blocking=True)
    return [
        data[start : start + array.size].view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]


class TablesFull(Exception):
    """A step needs a longer table than there is; it must bring its own."""

    def __init__(self, name: str, needed: int, capacity: int) -> None:
        super().__init__(f"table {name} takes {capacity} elements, the step needs {needed}")
        self.name = name
        self.needed = needed
        self.capacity = capacity


class StaticTables:
    """Owned by a kernel backend; used from the engine's thread, on its current stream.

    Attributes:
        views: each table by name, of its full shape. Beyond what the last `upload` wrote, the
            contents are arbitrary: whoever reads a table takes its length from another one.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        self._capacity = {name: math.prod(shape) for name, shape in shapes.items()}
        # Small ones side by side: those that are filled together travel together.
        self._order = sorted(shapes, key=lambda name: self._capacity[name] > _SMALL)
        self._start: dict[str, int] = {}
        total = 0
        for name in self._order:
            self._start[name] = total
            total += -(-self._capacity[name] // _ALIGNMENT) * _ALIGNMENT
        self._data = torch.zeros(total, dtype=torch.int32, device=device)
        self.views = {
            name: self._data[start : start + self._capacity[name]].view(shapes[name])
            for name, start in self._start.items()
        }
        self._mirrors = [_Mirror(total, device) for _ in range(_NUM_MIRRORS)]

    def upload(self, arrays: Mapping[str, npt.NDArray[np.int32]]) -> None:
        """Fill the beginning of the named tables; the others keep what they have.

        Raises:
            TablesFull: an array is longer than its table; nothing was changed.
        """
        for name, array in arrays.items():
            if array.size > self._capacity[name]:
                raise TablesFull(name, array.size, self._capacity[name])
        mirror = self._mirrors.pop(0)
        self._mirrors.append(mirror)
        mirror.begin()
        for name, array in arrays.items():
            start = self._start[name]
            mirror.values[start : start + array.size] = array.reshape(-1)
        for start, stop in self._runs(arrays):
            self._data[start:stop].copy_(mirror.data[start:stop], non_blocking=True)
        mirror.end()

    def _runs(self, arrays: Mapping[str, npt.NDArray[np.int32]]) -> list[tuple[int, int]]:
        """Return the ranges to copy; neighbours become one when little lies between them."""
        runs: list[tuple[int, int]] = []
        can_join = False
        for name in self._order:
            if name not in arrays:
                can_join = False
                continue
            start = self._start[name]
            stop = start + arrays[name].size
            if can_join:
                start = runs.pop()[0]
            runs.append((start, stop))
            can_join = self._capacity[name] <= _SMALL
        return runs


class _Mirror:
    """Host memory that a copy may still be reading after the next lines of Python have run."""

    def __init__(self, size: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.data = torch.zeros(size, dtype=torch.int32, pin_memory=is_cuda)
        self.values = self.data.numpy()
        self._copied = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Wait until the last copy out of this mirror has ended."""
        if self._copied is not None:
            self._copied.synchronize()

    def end(self) -> None:
        """Note that copies out of this mirror were enqueued."""
        if self._copied is not None:
            self._copied.record()
