"""Where each matrix of one adapter lies inside the adapter's pages.

First come the layers' pages: every layer is a run of chunks, the same pages in every layer. Site by
site come the A matrices (rows of length `in`), then the B matrices (transposed: rows of length
`out`), each at its true rank: nothing is padded to a maximum rank or to a tile. Ranks may differ
per layer and per projection; rank 0 means the module is absent. Behind them come the layer's parts
(`adapter_spec`), of which every row begins a chunk.

A part of the whole model would waste all layers but one of such pages. So the pages behind those of
the layers are read as *slices*, one after the other over all layers: slice `s` is layer `s % L` of
page `s // L`. As the pool is one tensor `[L, P, page_elems]`, slice ids index it as
`[L * P, page_elems]`, and kernels read such a matrix as they read any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from loraplex_memory.adapter_spec import (
    EMBEDDING_A,
    EPILOGUE_PARTS,
    ROW_PARALLEL_PARTS,
    AdapterRanks,
    AdapterSpec,
    Part,
    is_out_scale,
    part_row_elems,
)
from loraplex_memory.layout import PROJECTIONS, SITES, PoolLayout


@dataclass(frozen=True)
class AdapterLayout:
    """Chunk offsets of one adapter; immutable, and independent of where its pages are."""

    pool: PoolLayout
    spec: AdapterSpec

    def __post_init__(self) -> None:
        if len(self.ranks) != self.pool.geometry.num_layers:
            raise ValueError(
                f"ranks of {len(self.ranks)} layers for a model of {self.pool.geometry.num_layers}"
            )
        if any(len(row) != len(PROJECTIONS) or min(row) < 0 for row in self.ranks):
            raise ValueError(f"each layer needs {len(PROJECTIONS)} ranks of at least 0")

    @property
    def ranks(self) -> AdapterRanks:
        return self.spec.ranks

    @cached_property
    def _offsets(self) -> tuple[AdapterRanks, AdapterRanks, tuple[int, ...]]:
        a_offsets, b_offsets, totals = [], [], []
        for layer_ranks in self.ranks:
            a_row, b_row, total = self._layer_offsets(layer_ranks)
            a_offsets.append(a_row)
            b_offsets.append(b_row)
            totals.append(total)
        return tuple(a_offsets), tuple(b_offsets), tuple(totals)

    @cached_property
    def a_ranks(self) -> AdapterRanks:
        """Rows of A, `[layer][projection]`: a share of the ranks where A is cut over devices."""
        return tuple(
            tuple(map(self.pool.a_ranks, PROJECTIONS, layer_ranks)) for layer_ranks in self.ranks
        )

    def _layer_offsets(
        self, layer_ranks: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        pool, chunk = self.pool, self.pool.chunk_elems
        rank = dict(zip(PROJECTIONS, layer_ranks, strict=True))
        a_at, b_at, cursor = {}, {}, 0
        for site in SITES.values():
            for p in site:
                a_at[p] = cursor
                cursor += pool.a_ranks(p, rank[p]) * (pool.a_width(p) // chunk)
            for p in site:
                b_at[p] = cursor
                cursor += rank[p] * (pool.b_width(p) // chunk)
        return tuple(a_at[p] for p in PROJECTIONS), tuple(b_at[p] for p in PROJECTIONS), cursor

    @property
    def a_chunks(self) -> AdapterRanks:
        """First chunk of A, `[layer][projection]`."""
        return self._offsets[0]

    @property
    def b_chunks(self) -> AdapterRanks:
        """First chunk of B (stored `[R, out]`), `[layer][projection]`."""
        return self._offsets[1]

    @property
    def lora_chunks(self) -> tuple[int, ...]:
        """Chunks of each layer's LoRA pairs; its parts begin there."""
        return self._offsets[2]

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The parts of the spec as pages hold them: those of cut linears are cut as these are."""
        if self.pool.num_ranks == 1:
            return self.spec.parts
        own = (part_row_elems(part.name, self.pool.shard) for part in self.spec.parts)
        return tuple(
            replace(part, row_elems=row_elems or part.row_elems)
            for part, row_elems in zip(self.spec.parts, own, strict=True)
        )

    def part(self, name: str) -> Part | None:
        """Return the part of this name as pages hold it, if the adapter has it."""
        return self._by_name.get(name)

    @cached_property
    def _by_name(self) -> dict[str, Part]:
        return {part.name: part for part in self.parts}

    def is_epilogue(self, part: Part) -> bool:
        """Whether a part changes a linear's output in the linear's own epilogue.

        A row-parallel linear has its output only once those of all devices are added.
        """
        is_late = self.pool.num_ranks > 1 and part.name in ROW_PARALLEL_PARTS
        return part.name in EPILOGUE_PARTS and not is_late

    @cached_property
    def needs_edits(self) -> bool:
        """Whether something is left to do outside the epilogues of linears."""
        return not all(map(self.is_epilogue, self.parts))

    @cached_property
    def changes_linears(self) -> bool:
        """Whether there is anything for the LoRA kernels to do."""
        return any(map(any, self.ranks)) or any(map(self.is_epilogue, self.parts))

    @cached_property
    def _parts(self) -> tuple[dict[str, tuple[int, ...]], dict[str, int], tuple[int, ...], int]:
        """First chunks of the parts of layers and of the model, and where each run ends."""
        ends = list(self.lora_chunks)
        of_layers: dict[str, tuple[int, ...]] = {}
        of_model: dict[str, int] = {}
        model_end = 0
        for part in self.parts:
            num_chunks = self.part_chunks(part)
            if not part.layers:
                of_model[part.name] = model_end
                model_end += num_chunks
                continue
            starts = [-1] * len(ends)
            for layer in part.layers:
                starts[layer] = ends[layer]
                ends[layer] += num_chunks
            of_layers[part.name] = tuple(starts)
        return of_layers, of_model, tuple(ends), model_end

    def part_chunks(self, part: Part) -> int:
        """Return the chunks of a part, in each layer that has it."""
        chunk = self.pool.chunk_elems
        if part.name == EMBEDDING_A:  # looked up element by element: rows of a rank need no chunk
            return -(-part.num_rows * part.row_elems // chunk)
        return self.paged_rows(part) * (self.row_pitch(part) // chunk)

    def paged_rows(self, part: Part) -> int:
        """Return the rows of a part in the pages: of an output scale, two that are added."""
        return 2 if is_out_scale(part.name) else part.num_rows

    def row_pitch(self, part: Part) -> int:
        """Return the elements between the rows of a part."""
        chunk = self.pool.chunk_elems
        return part.row_elems if part.name == EMBEDDING_A else -(-part.row_elems // chunk) * chunk

    def layer_part(self, name: str) -> tuple[int, ...] | None:
        """Return the first chunk of a part in each layer, -1 where there is none."""
        return self._parts[0].get(name)

    def model_part(self, name: str) -> int | None:
        """Return the first chunk of a part of the model, among the slices."""
        return self._parts[1].get(name)

    @cached_property
    def num_layer_pages(self) -> int:
        """Pages of the layers: the fullest layer decides, as pages span all layers."""
        return -(-max(self._parts[2]) // self.pool.chunks_per_page)

    @cached_property
    def num_pages(self) -> int:
        """Pages the adapter occupies; those behind `num_layer_pages` are read as slices."""
        slices = -(-self._parts[3] // self.pool.chunks_per_page)
        return self.num_layer_pages + -(-slices // self.pool.geometry.num_layers)

    @property
    def num_elems(self) -> int:
        """Elements over all layers that carry weights, without the tail of the last page."""
        return (sum(self._parts[2]) + self._parts[3]) * self.pool.chunk_elems
