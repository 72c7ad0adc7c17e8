"""What the LoRA launches of a step must move, next to what their own indexing moves.

The bound is bytes: with one row per adapter there is about one FLOP per byte of weights. "Must" is
counted from the LoRA batch (each adapter's matrices once, at their true rank), "moves" from the
items of the work list, so that the one checks the other. A weight that several row ranges of a
long segment read, or several row tiles of one item, is told apart: it comes from a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
import numpy.typing as npt

from loraplex_kernels.batch import LoRABatch
from loraplex_kernels.lora_shape import ROW_TILE, LoRAShape
from loraplex_kernels.lora_work import ITEM_FIELDS, LoRAWork
from loraplex_kernels.plane_places import IntArray

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class LaunchTraffic:
    """One launch, in bytes and floating-point operations.

    Attributes:
        must_weights: each adapter's matrices once, at their true rank.
        weights: what the items read, each element once.
        reread_weights: what further row ranges and row tiles read again, from L1 or L2.
        must_activations: rows of `x` once; or rows of `y` once in and once out.
        activations: what the items move: `x` again for each rank tile.
        must_planes: one rank vector of each row, in float32.
        planes: what the items move: a vector per K part, and again for each column block.
        index: items and page ids, each time a program asks for them; nearly always a cache answers.
        must_flops: two per weight and row.
        flops: what the tiles multiply, masked rows and ranks included.
    """

    must_weights: int
    weights: int
    reread_weights: int
    must_activations: int
    activations: int
    must_planes: int
    planes: int
    index: int
    must_flops: int
    flops: int

    def __add__(self, other: LaunchTraffic) -> LaunchTraffic:
        return LaunchTraffic(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    @property
    def padding(self) -> float:
        """Weights read beyond the true ranks, as a share of them."""
        return self.weights / self.must_weights - 1 if self.must_weights else 0.0


def launch_traffic(
    batch: LoRABatch, work: LoRAWork, shapes: Sequence[LoRAShape], *, layer: int, elem_bytes: int
) -> dict[str, LaunchTraffic]:
    """Return the traffic of each launch of one layer, by name."""
    launches = {}
    for shape in shapes:
        for name, traffic in (
            ("shrink", _shrink_traffic(batch, work, shape, layer, elem_bytes)),
            ("expand", _expand_traffic(batch, work, shape, layer, elem_bytes)),
        ):
            launches[f"site {shape.index} {name}"] = traffic
    return launches


def rival_weight_bytes(
    batch: LoRABatch, shapes: Sequence[LoRAShape], *, layer: int, elem_bytes: int, slot_rank: int
) -> dict[str, int]:
    """Return the weight bytes of one layer that other designs read for the same step.

    Padded slots (vLLM, SGLang) read `slot_rank` rows of every module that an adapter has; BGMV over
    tokens (S-LoRA) reads an adapter's matrices again for each of its rows.
    """
    true_ranks = padded = per_token = 0
    num_rows = np.diff(batch.seg_indptr.numpy())
    for shape in shapes:
        for module, width in zip(shape.modules, shape.out_features, strict=True):
            ranks = batch.ranks.numpy()[layer, :, module].astype(np.int64)
            row_elems = shape.in_features + width
            true_ranks += int(ranks.sum()) * row_elems
            padded += int((ranks > 0).sum()) * slot_rank * row_elems
            per_token += int((ranks * num_rows).sum()) * row_elems
    counts = {"true ranks": true_ranks, "padded slots": padded, "per token": per_token}
    return {name: elems * elem_bytes for name, elems in counts.items()}


def traffic_table(launches: dict[str, LaunchTraffic]) -> str:
    """Format launches and their sum, in kB and MFLOP."""
    columns = [field.name for field in fields(LaunchTraffic)]
    total = sum(launches.values(), LaunchTraffic(*[0] * len(columns)))
    rows = [*launches.items(), ("all", total)]
    width = max(len(name) for name, _ in rows)
    lines = ["  ".join([f"{'kB, MFLOP':<{width}}", *columns, "padding"])]
    for name, traffic in rows:
        cells = [
            f"{value / (1e6 if column.endswith('flops') else 1e3):>{len(column)}.1f}"
            for column, value in zip(columns, astuple(traffic), strict=True)
        ]
        lines.append("  ".join([f"{name:<{width}}", *cells, f"{traffic.padding:>7.2%}"]))
    return "\n".join(lines)


@dataclass(frozen=True)
class _Items:
    """Columns of a launch's items, as int64."""

    row_count: npt.NDArray[np.int64]
    num_ranks: npt.NDArray[np.int64]
    is_first: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, work: LoRAWork, span: IntArray) -> _Items:
        items = work.items[span[0] : span[0] + span[1]].astype(np.int64)
        items = items.reshape(-1, ITEM_FIELDS)
        _, first = np.unique(items[:, 2:4], axis=0, return_index=True)
        is_first = np.zeros(len(items), dtype=np.bool_)
        is_first[first] = True
        return cls(items[:, 1], items[:, 4], is_first)

    @property
    def row_tiles(self) -> npt.NDArray[np.int64]:
        return -(-self.row_count // ROW_TILE)

    def weight_elems(self, row_elems: int) -> tuple[int, int]:
        """Return elements read for the first time, and again, if a rank row has `row_elems`."""
        elems = self.num_ranks * row_elems
        once = int(elems[self.is_first].sum())
        return once, int((elems * self.row_tiles).sum()) - once


def _rows_and_ranks(
    batch: LoRABatch, shape: LoRAShape, layer: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return rows `[G]` and true ranks `[G, modules]`."""
    ranks = batch.ranks.numpy()[layer][:, list(shape.modules)].astype(np.int64)
    return np.diff(batch.seg_indptr.numpy()).astype(np.int64), ranks


def _shrink_traffic(
    batch: LoRABatch, work: LoRAWork, shape: LoRAShape, layer: int, elem_bytes: int
) -> LaunchTraffic:
    rows, ranks = _rows_and_ranks(batch, shape, layer)
    run_ranks = ranks.sum(axis=1)
    items = _Items.of(work, work.spans[layer, shape.index, 0])
    width, num_parts = shape.in_features, 1 if work.is_serial else shape.num_parts
    once, again = items.weight_elems(width)
    plane_elems = int((rows * run_ranks).sum())
    tile_ranks = shape.rank_tile(is_serial=work.is_serial)
    page_ids = 2 * int((items.num_ranks * items.row_tiles).sum()) * shape.num_parts
    units = len(items.row_count) * num_parts
    return LaunchTraffic(
        must_weights=int(run_ranks.sum()) * width * elem_bytes,
        weights=once * elem_bytes,
        reread_weights=again * elem_bytes,
        must_activations=int(rows[run_ranks > 0].sum()) * width * elem_bytes,
        activations=int(items.row_count.sum()) * width * elem_bytes,
        must_planes=plane_elems * _FLOAT32_BYTES,
        planes=int((items.row_count * items.num_ranks).sum()) * num_parts * _FLOAT32_BYTES,
        index=units * ITEM_FIELDS * 4 + page_ids * 4,
        must_flops=2 * plane_elems * width,
        flops=2 * int(items.row_tiles.sum()) * ROW_TILE * tile_ranks * width,
    )


def _expand_traffic(
    batch: LoRABatch, work: LoRAWork, shape: LoRAShape, layer: int, elem_bytes: int
) -> LaunchTraffic:
    total = LaunchTraffic(*[0] * len(fields(LaunchTraffic)))
    rows, ranks = _rows_and_ranks(batch, shape, layer)
    num_planes = 1 if work.is_serial else shape.num_parts
    for position, width in enumerate(shape.out_features):
        items = _Items.of(work, work.spans[layer, shape.index, 1 + position])
        rank, blocks = ranks[:, position], shape.blocks[position]
        # The last block of a row that is no multiple of 16 bytes takes the rest of its chunk.
        read_width = -(-width // 8) * 8 if shape.is_tiled else width
        once, again = items.weight_elems(read_width)
        vectors = int((items.row_count * items.num_ranks).sum())
        rank_tiles = -(-items.num_ranks // ROW_TILE)
        page_ids = int((items.num_ranks * items.row_tiles).sum()) * blocks
        total += LaunchTraffic(
            must_weights=int(rank.sum()) * width * elem_bytes,
            weights=once * elem_bytes,
            reread_weights=again * elem_bytes,
            must_activations=2 * int(rows[rank > 0].sum()) * width * elem_bytes,
            activations=2 * int(items.row_count.sum()) * width * elem_bytes,
            must_planes=int((rows * rank).sum()) * _FLOAT32_BYTES,
            planes=vectors * num_planes * blocks * _FLOAT32_BYTES,
            index=len(items.row_count) * blocks * ITEM_FIELDS * 4 + page_ids * 4,
            must_flops=2 * int((rows * rank).sum()) * width,
            flops=2
            * int((items.row_tiles * rank_tiles).sum())
            * ROW_TILE**2
            * blocks
            * shape.block_n,
        )
    return total
