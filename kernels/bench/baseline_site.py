"""One LoRA site of one step, as every baseline takes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import torch

from loraplex_kernels.batch import LoRABatch
from loraplex_kernels.reference import read_rows


class Baseline(Protocol):
    """Adds the LoRA delta of a site; what it keeps on the device is built before timing."""

    def __call__(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add the delta to `y` `[T, sum(out)]` in place, for the input `x` `[T, in]`."""


@dataclass(frozen=True)
class Site:
    """Paged weights of a site, the rows that use them, and the widths.

    Attributes:
        pool_layer: `[P, page_elems]`.
        batch: on the pool's device.
        layer: index of the layer.
        projections: indices (order q k v o gate up down) of the site's projections.
        in_features: width of the input.
        out_features: output width of each projection.
    """

    pool_layer: torch.Tensor
    batch: LoRABatch
    layer: int
    projections: tuple[int, ...]
    in_features: int
    out_features: tuple[int, ...]

    @property
    def columns(self) -> list[int]:
        """First output column of each projection."""
        return [0, *accumulate(self.out_features)][:-1]

    def segments(self) -> list[torch.Tensor]:
        """Token rows of each adapter, int64."""
        indptr = self.batch.seg_indptr.tolist()
        rows = self.batch.row_ids.long()
        return [rows[a:b] for a, b in pairwise(indptr)]

    def row_segments(self) -> torch.Tensor:
        """int32 `[N]`: the adapter of each entry of `row_ids`."""
        counts = self.batch.seg_indptr.diff().long()
        index = torch.arange(len(counts), dtype=torch.int32, device=counts.device)
        return index.repeat_interleave(counts)

    def max_rank(self) -> int:
        """The largest rank of the site, which padded layouts allocate for every adapter."""
        return int(self.batch.ranks[self.layer][:, list(self.projections)].max())

    def matrices(self) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        """Yield adapter, slice, A `[r, in]` and B `[r, out]` of every module that is there."""
        batch, layer = self.batch, self.layer
        for g in range(batch.num_segments):
            for s, projection in enumerate(self.projections):
                rank = int(batch.ranks[layer, g, projection])
                if rank:
                    pages, elems = batch.page_table[g], batch.chunk_elems
                    a_at = int(batch.a_chunks[layer, g, projection])
                    b_at = int(batch.b_chunks[layer, g, projection])
                    a_shape, b_shape = (rank, self.in_features), (rank, self.out_features[s])
                    a = read_rows(self.pool_layer, pages, a_at, a_shape, elems)
                    b = read_rows(self.pool_layer, pages, b_at, b_shape, elems)
                    yield g, s, a, b
