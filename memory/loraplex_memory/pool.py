"""The bytes of the pool: one tensor for KV cache and adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from loraplex_memory.layout import PoolLayout
from loraplex_memory.runs import runs


class PagePool:
    """Owned by the engine process; `data` is `[L, P, page_elems]`, allocated once.

    Who may write: the forward pass into pages of running sequences, the adapter loader into pages
    of adapters that are still loading. The accounts (`PageAllocator`, `AdapterResidency`) keep the
    two apart, so no lock is needed.
    """

    def __init__(
        self,
        layout: PoolLayout,
        num_pages: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layout = layout
        self.num_pages = num_pages
        shape = (layout.geometry.num_layers, num_pages, layout.page_elems)
        self.data = zeros(shape, dtype, torch.device(device))

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return self.layout.page_bytes(self.data.element_size())

    def layer(self, layer: int) -> torch.Tensor:
        """Return layer `layer`, `[P, page_elems]`, a view."""
        return self.data[layer]

    def kv(self, layer: int) -> torch.Tensor:
        """Return the KV view `[P, 2, page_tokens, num_kv_heads, head_dim]` of one layer."""
        geometry = self.layout.shard
        return self.data[layer].view(
            self.num_pages, 2, self.layout.page_tokens, geometry.num_kv_heads, geometry.head_dim
        )

    def write(self, pages: Sequence[int], packed: torch.Tensor) -> None:
        """Copy packed pages `[L, len(pages), page_elems]`, of any strides, to where they belong."""
        packed = packed.to(device=self.device, dtype=self.dtype)
        # Not `index_copy_`, which goes element by element and takes three times as long.
        for run in runs(pages):
            first, num_pages = pages[run.start], run.stop - run.start
            self.data[:, first : first + num_pages].copy_(packed[:, run])


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros, and on a CPU commit no memory for pages that are never used."""
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the system for zero pages, committed on first write; torch.zeros writes them all.
    raw = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
