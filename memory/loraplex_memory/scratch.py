"""Memory for what lives no longer than one load."""

from __future__ import annotations

import math
from typing import Final

import torch

#: Covers a rank-64 adapter on q, k, v and o of an 8B model; a larger one gets memory of its own.
_MAX_KEPT_BYTES: Final = 128 << 20


class Scratch:
    """Owned by one thread. Kept from one use to the next: fresh memory costs a fault per 4 KiB."""

    def __init__(self, max_kept_bytes: int = _MAX_KEPT_BYTES) -> None:
        self._max_kept_bytes = max_kept_bytes
        self._data = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor of any contents; the next call may return the same memory."""
        num_bytes = math.prod(shape) * dtype.itemsize
        data = self._data
        if num_bytes > data.numel():
            data = torch.empty(num_bytes, dtype=torch.uint8)
            if num_bytes <= self._max_kept_bytes:
                self._data = data
        return data[:num_bytes].view(dtype).view(shape)
