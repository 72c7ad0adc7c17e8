"""Where each LoRA matrix of one adapter lies inside the adapter's pages.

Every layer of an adapter is a run of chunks, the same pages in every layer. Site by site come the A
matrices (rows of length `in`), then the B matrices (transposed: rows of length `out`), each at its
true rank: nothing is padded to a maximum rank or to a tile. Ranks may differ per layer and per
projection; rank 0 means the module is absent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from loraplex_memory.layout import PROJECTIONS, SITES, PoolLayout

#: `ranks[layer][projection]`, projections in the order of `PROJECTIONS`; 0 is "no module here".
AdapterRanks = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class AdapterLayout:
    """Chunk offsets of one adapter; immutable, and independent of where its pages are."""

    pool: PoolLayout
    ranks: AdapterRanks

    def __post_init__(self) -> None:
        if len(self.ranks) != self.pool.geometry.num_layers:
            raise ValueError(
                f"ranks of {len(self.ranks)} layers for a model of {self.pool.geometry.num_layers}"
            )
        if any(len(row) != len(PROJECTIONS) or min(row) < 0 for row in self.ranks):
            raise ValueError(f"each layer needs {len(PROJECTIONS)} ranks of at least 0")

    @cached_property
    def _offsets(self) -> tuple[AdapterRanks, AdapterRanks, tuple[int, ...]]:
        a_offsets, b_offsets, totals = [], [], []
        for layer_ranks in self.ranks:
            a_row, b_row, total = self._layer_offsets(layer_ranks)
            a_offsets.append(a_row)
            b_offsets.append(b_row)
            totals.append(total)
        return tuple(a_offsets), tuple(b_offsets), tuple(totals)

    def _layer_offsets(
        self, layer_ranks: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        geometry, chunk = self.pool.geometry, self.pool.chunk_elems
        rank = dict(zip(PROJECTIONS, layer_ranks, strict=True))
        a_at, b_at, cursor = {}, {}, 0
        for site in SITES.values():
            for projection in site:
                a_at[projection] = cursor
                cursor += rank[projection] * (geometry.in_features(projection) // chunk)
            for projection in site:
                b_at[projection] = cursor
                cursor += rank[projection] * (geometry.out_features(projection) // chunk)
        return tuple(a_at[p] for p in PROJECTIONS), tuple(b_at[p] for p in PROJECTIONS), cursor

    @property
    def a_chunks(self) -> AdapterRanks:
        """First chunk of A, `[layer][projection]`."""
        return self._offsets[0]

    @property
    def b_chunks(self) -> AdapterRanks:
        """First chunk of B (stored `[R, out]`), `[layer][projection]`."""
        return self._offsets[1]

    @cached_property
    def num_pages(self) -> int:
        """Pages the adapter occupies: the fullest layer decides, as pages span all layers."""
        return -(-max(self._offsets[2]) // self.pool.chunks_per_page)

    @property
    def num_elems(self) -> int:
        """Elements over all layers that carry weights, without the tail of the last page."""
        return sum(self._offsets[2]) * self.pool.chunk_elems
