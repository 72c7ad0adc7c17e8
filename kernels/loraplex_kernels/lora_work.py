"""The flat work list of the LoRA kernels: what each launch of a step has to do, built on the host.

Items hold everything a program needs, so that it reads one record and then weights. Column blocks
and K parts are not in the list: they follow from a site's shape, and the kernels count them off.
Layers whose adapters have equal ranks and places (nearly always all of them) share their items.
Built fresh each step and never cached, as is the LoRA batch that it comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from loraplex_kernels.batch import LoRABatch
from loraplex_kernels.lora_shape import LoRAShape
from loraplex_kernels.plane_places import (
    IntArray,
    RowRanges,
    RunPlanes,
    number,
    packed_planes,
    scratch_planes,
)
from loraplex_kernels.static_tables import copy_tables

#: int32 of one item.
ITEM_FIELDS: Final = 8

#: Launches of a site in a span: the shrink, then the expand of each of up to three modules.
NUM_LAUNCHES: Final = 4


@dataclass(frozen=True)
class LoRAWork:
    """The work of one step; every array is int32 and contiguous.

    An item of the shrink is `(row_start, row_count, pages_start, weight_start, num_ranks,
    plane_start, plane_pitch, run_rank)`: up to `segment_rows` rows of one adapter by up to a tile
    of rank rows. An item of the expand is `(row_start, row_count, pages_start, weight_start, rank,
    plane_start, plane_pitch, epilogue)`: the same rows by one module. Weights start at an element
    of the adapter's slice of a layer, planes at a float32 of the scratch buffer, where an item's
    rows have a block `[part, row_count, plane_pitch]`, or see `plane_places`. `epilogue` is -1 or
    the index of a record `(scale_start, bias_start, weight)` in `items`: the starts -1 or an
    element of the slice, the weight as the bits of a float32.

    Attributes:
        rows: `[N]`, token rows that have an adapter, segment by segment.
        pages: `[G * P_max]`, page ids; adapter `g` begins at `g * P_max`.
        spans: `[L, sites, 4, 2]`, first item and number of items of each launch. The kernels read
            it from device memory: the tables it comes with may be larger, and stale beyond.
        items: `[I, 8]`.
        plane_elems: float32 elements of scratch that the largest site needs.
        is_serial: whether the shrink adds the K parts itself, see `LoRATuning.serial_rows`. Steps
            under that many rows are never serial, but where the adapters are cut over ranks, as
            only sums travel.
        is_weighted: whether some segment has a weight that is not 1.
    """

    rows: IntArray
    pages: IntArray
    spans: IntArray
    items: IntArray
    plane_elems: int
    is_serial: bool
    is_weighted: bool = False

    def to(self, device: torch.device) -> LoRATables:
        """Copy every table to `device` in one transfer, and make scratch for them."""
        rows, pages, spans, items = copy_tables(
            [self.rows, self.pages, self.spans, self.items], device
        )
        planes = torch.empty(self.plane_elems, dtype=torch.float32, device=device)
        return LoRATables(rows, pages, spans, items, planes, self.is_serial, self.is_weighted)


@dataclass(frozen=True)
class LoRATables:
    """`LoRAWork` on the device, and the scratch between shrink and expand.

    The tensors may be larger than a step needs, and at fixed addresses: `spans` says what is valid.
    """

    rows: torch.Tensor
    pages: torch.Tensor
    spans: torch.Tensor
    items: torch.Tensor
    planes: torch.Tensor
    is_serial: bool
    is_weighted: bool = False


def no_lora_work(num_layers: int, num_sites: int) -> LoRAWork:
    """Return the work of a step in which no row has an adapter."""
    empty = np.zeros(0, dtype=np.int32)
    spans = np.zeros((num_layers, num_sites, NUM_LAUNCHES, 2), dtype=np.int32)
    return LoRAWork(empty, empty, spans, empty.reshape(0, ITEM_FIELDS), 0, False)


def build_lora_work(batch: LoRABatch, shapes: Sequence[LoRAShape]) -> LoRAWork:
    """Lay out the items of a step.

    Args:
        batch: the step, in host memory.
        shapes: the sites of a layer, in the order of their `index`.
    """
    assert [shape.index for shape in shapes] == list(range(len(shapes)))
    rows, seg_indptr = batch.row_ids.numpy(), batch.seg_indptr.numpy()
    page_table = batch.page_table.numpy()
    tuning = shapes[0].tuning
    ranges = RowRanges.of(seg_indptr, tuning.segment_rows)
    tables = _LayerTables.of(batch)
    class_of_layer, members = tables.classes()
    weights = None if batch.weights is None else batch.weights.numpy()
    is_serial = batch.a_ranks is not None or len(rows) >= tuning.serial_rows
    builder = _ItemBuilder(ranges, seg_indptr, page_table.shape[1], is_serial, weights)
    spans = np.zeros((len(members), len(shapes), NUM_LAUNCHES, 2), dtype=np.int32)
    for index, layer in enumerate(members):
        for shape in shapes:
            spans[index, shape.index] = builder.add_site(shape, tables.at(layer, shape))
    return LoRAWork(
        rows=rows,
        pages=page_table.ravel(),
        spans=spans[class_of_layer],
        items=builder.items(),
        plane_elems=builder.plane_elems,
        is_serial=builder.is_serial,
        is_weighted=weights is not None,
    )


@dataclass(frozen=True)
class _SiteTables:
    """Of one layer, `[G, modules]` each; chunks are -1 where there is no scale or bias."""

    ranks: IntArray
    a_ranks: IntArray | None
    a_chunks: IntArray
    b_chunks: IntArray
    scale_chunks: IntArray | None
    bias_chunks: IntArray | None


@dataclass(frozen=True)
class _LayerTables:
    """The batch's tables `[L, G, 7]` as numpy sees them."""

    tables: tuple[IntArray | None, ...]

    @classmethod
    def of(cls, batch: LoRABatch) -> _LayerTables:
        fields = (batch.ranks, batch.a_ranks, batch.a_chunks, batch.b_chunks)
        epilogues = (batch.scale_chunks, batch.bias_chunks)
        arrays = [None if t is None else t.numpy() for t in (*fields, *epilogues)]
        return cls(tuple(arrays))

    def at(self, layer: int, shape: LoRAShape) -> _SiteTables:
        modules = list(shape.modules)
        ranks, a_ranks, a_chunks, b_chunks, scale_chunks, bias_chunks = (
            None if table is None else table[layer][:, modules] for table in self.tables
        )
        assert ranks is not None
        assert a_chunks is not None
        assert b_chunks is not None
        return _SiteTables(ranks, a_ranks, a_chunks, b_chunks, scale_chunks, bias_chunks)

    def classes(self) -> tuple[IntArray, list[int]]:
        """Return the class of each layer, and one layer of each class."""
        return layer_classes([t for t in self.tables if t is not None])


def layer_classes(tables: Sequence[IntArray]) -> tuple[IntArray, list[int]]:
    """Return the class of each layer, and one layer of each class.

    Layers are of one class when all their tables are equal.

    Args:
        tables: `[L, ...]` each, at least one.
    """
    num_layers = len(tables[0])
    if all((t == t[:1]).all() for t in tables):
        return np.zeros(num_layers, dtype=np.int32), [0]
    seen: dict[tuple[bytes, ...], int] = {}
    members: list[int] = []
    class_of_layer = np.zeros(num_layers, dtype=np.int32)
    for layer in range(num_layers):
        key = tuple(t[layer].tobytes() for t in tables)
        if key not in seen:
            seen[key] = len(members)
            members.append(layer)
        class_of_layer[layer] = seen[key]
    return class_of_layer, members


class _ItemBuilder:
    """Collects the items of all sites. A site's planes begin at 0, as sites run one by one."""

    def __init__(
        self,
        ranges: RowRanges,
        seg_indptr: IntArray,
        pages_per_adapter: int,
        is_serial: bool,
        weights: npt.NDArray[np.float32] | None,
    ) -> None:
        self._ranges = ranges
        self._seg_indptr = seg_indptr
        self._pages_start = ranges.segment * np.int32(pages_per_adapter)
        self._weights = weights
        self._blocks: list[IntArray] = []
        self._count = 0
        self.is_serial = is_serial
        self.plane_elems = 0

    def items(self) -> IntArray:
        return np.concatenate([np.zeros((0, ITEM_FIELDS), dtype=np.int32), *self._blocks])

    def add_site(self, shape: LoRAShape, tables: _SiteTables) -> IntArray:
        """Add the items of one site of one class of layers; return its spans `[4, 2]`."""
        spans = np.zeros((NUM_LAUNCHES, 2), dtype=np.int32)
        spans[0, 0] = self._count
        written, read = self._place_planes(shape, tables)
        for planes in written:
            spans[0, 1] += self._add_shrink(shape, tables, planes)
        for planes in read:
            column = np.zeros_like(planes.rank)
            for position in planes.positions:
                launch = 1 + position
                spans[launch] = self._add_expand(shape, tables, position, planes, column)
                column = column + tables.ranks[:, position]
        return spans

    def _place_planes(
        self, shape: LoRAShape, tables: _SiteTables
    ) -> tuple[list[RunPlanes], list[RunPlanes]]:
        """Return where the shrink writes and the expand reads, by run of modules."""
        runs, indptr = _runs(shape, tables), self._seg_indptr
        if tables.a_ranks is not None:  # between them come the other ranks
            written, read = (
                packed_planes(self._ranges, indptr, ranks, runs)
                for ranks in (tables.a_ranks, tables.ranks)
            )
            return written, read
        num_planes = 1 if self.is_serial else shape.num_parts
        planes, num_elems = scratch_planes(self._ranges, tables.ranks, runs, num_planes)
        self.plane_elems = max(self.plane_elems, num_elems)
        return planes, planes

    def _add_shrink(self, shape: LoRAShape, tables: _SiteTables, planes: RunPlanes) -> int:
        tile_ranks = shape.rank_tile(is_serial=self.is_serial)
        num_tiles = -(-planes.rank // tile_ranks)
        at, tile = number(num_tiles[self._ranges.segment])
        segment = self._ranges.segment[at]
        first = tile * np.int32(tile_ranks)
        first_elem = first * (1 if shape.is_embedding else shape.row_pitch(shape.in_features))
        a_chunks = tables.a_chunks[segment, planes.positions[0]]
        _, count = self._append(
            at,
            a_chunks * shape.chunk_elems + first_elem,
            np.minimum(planes.rank[segment] - first, tile_ranks),
            planes.start[at] + first,
            planes.pitch[segment],
            planes.rank[segment],
        )
        return count

    def _add_expand(
        self,
        shape: LoRAShape,
        tables: _SiteTables,
        position: int,
        planes: RunPlanes,
        column: IntArray,
    ) -> tuple[int, int]:
        ranks = tables.ranks[:, position]
        epilogue = self._add_epilogues(shape, tables, position)
        at = np.flatnonzero(((ranks > 0) | (epilogue >= 0))[self._ranges.segment])
        segment = self._ranges.segment[at]
        return self._append(
            at,
            tables.b_chunks[segment, position] * shape.chunk_elems,
            ranks[segment],
            planes.start[at] + column[segment],
            planes.pitch[segment],
            epilogue[segment],
        )

    def _add_epilogues(self, shape: LoRAShape, tables: _SiteTables, position: int) -> IntArray:
        """Add a record for each adapter with a scale, a bias or a weight; return its index or -1,
        `[G]`.
        """
        absent = np.full(len(tables.ranks), -1, dtype=np.int32)
        if tables.scale_chunks is None and self._weights is None:
            return absent
        scale, bias = (
            absent if chunks is None else chunks[:, position]
            for chunks in (tables.scale_chunks, tables.bias_chunks)
        )
        weights = np.ones_like(absent, np.float32) if self._weights is None else self._weights
        is_weighted = (weights != 1.0) & (tables.ranks[:, position] > 0)
        at = np.flatnonzero((scale >= 0) | (bias >= 0) | is_weighted)
        index = absent.copy()
        records = np.zeros((len(at), ITEM_FIELDS), dtype=np.int32)
        records[:, 2] = weights[at].view(np.int32)
        for field, chunks in enumerate((scale, bias)):
            records[:, field] = np.where(chunks[at] >= 0, chunks[at] * shape.chunk_elems, -1)
        index[at] = self._count + np.arange(len(at), dtype=np.int32)
        self._add(records)
        return index

    def _append(
        self,
        at: npt.NDArray[np.integer[Any]],
        weight_start: IntArray,
        num_ranks: IntArray,
        plane_start: IntArray,
        plane_pitch: IntArray,
        last: IntArray,
    ) -> tuple[int, int]:
        """Add an item for each row range of `at`; return the first one and their number."""
        ranges, first = self._ranges, self._count
        block = np.empty((len(at), ITEM_FIELDS), dtype=np.int32)
        fields = (ranges.row_start[at], ranges.row_count[at], self._pages_start[at])
        for field, values in enumerate(
            (*fields, weight_start, num_ranks, plane_start, plane_pitch, last)
        ):
            block[:, field] = values
        self._add(block)
        return first, len(at)

    def _add(self, block: IntArray) -> None:
        self._blocks.append(block)
        self._count += len(block)


def _runs(shape: LoRAShape, tables: _SiteTables) -> list[list[int]]:
    """Return the modules, by position in the site, whose A matrices follow one another.

    They share rows of one length, so their rank rows are cut into tiles as those of one matrix.
    `AdapterLayout` lays all of a site out like that; adapters that differ get a run per module.
    """
    positions = list(range(len(shape.modules)))
    row_chunks = shape.row_pitch(shape.in_features) // shape.chunk_elems
    ranks = tables.ranks if tables.a_ranks is None else tables.a_ranks
    ends = tables.a_chunks + ranks * np.int32(row_chunks)
    if np.array_equal(ends[:, :-1], tables.a_chunks[:, 1:]):
        return [positions]
    return [[position] for position in positions]
