"""Where in a buffer of planes the rows of each segment find theirs, run by run of modules.

On one device the planes are scratch between two launches: blocks `[part, row_count, pitch]` with
rows that begin aligned. Between the halves of several devices they are one part, packed as
`lora_planes` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loraplex_kernels.lora_planes import PlaneLayout
from loraplex_kernels.lora_shape import ROW_TILE

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class RowRanges:
    """Up to `segment_rows` rows of one segment, `[ranges]` each."""

    segment: IntArray
    row_start: IntArray
    row_count: IntArray

    @classmethod
    def of(cls, seg_indptr: IntArray, segment_rows: int) -> RowRanges:
        """Cut the segments of `seg_indptr` `[G + 1]`."""
        counts = np.diff(seg_indptr)
        segment, position = number(-(-counts // segment_rows))
        offset = position * segment_rows
        row_count = np.minimum(counts[segment] - offset, segment_rows)
        return cls(segment, seg_indptr[segment] + offset, row_count.astype(np.int32))


@dataclass(frozen=True)
class RunPlanes:
    """The planes of one run of modules.

    Attributes:
        positions: the modules, by position in the site.
        rank: `[G]`, rank rows of all of them together.
        pitch: `[G]`, elements between rows of a plane.
        start: `[ranges]`, first element of each row range.
    """

    positions: tuple[int, ...]
    rank: IntArray
    pitch: IntArray
    start: IntArray


def scratch_planes(
    ranges: RowRanges, ranks: IntArray, runs: Sequence[Sequence[int]], num_planes: int
) -> tuple[list[RunPlanes], int]:
    """Place the blocks of each run one behind the other; return also how many elements they take.

    Args:
        ranks: `[G, modules]`.
        runs: modules, by position in the site.
        num_planes: K parts of a block.
    """
    places, stop = [], 0
    for run in runs:
        rank = _sum(ranks, run)
        pitch = -(-rank // ROW_TILE) * np.int32(ROW_TILE)
        sizes = ranges.row_count * pitch[ranges.segment].astype(np.int64) * num_planes
        ends = stop + np.cumsum(sizes)
        places.append(RunPlanes(tuple(run), rank, pitch, _int32(ends - sizes)))
        stop = int(ends[-1]) if ends.size else stop
    assert stop < 2**31, "kernels index the planes with int32"
    return places, stop


def packed_planes(
    ranges: RowRanges, seg_indptr: IntArray, ranks: IntArray, runs: Sequence[Sequence[int]]
) -> list[RunPlanes]:
    """Place the planes of each run as `lora_planes` lays out those of segments of `ranks`."""
    layout = PlaneLayout.of(seg_indptr, ranks)
    assert layout.num_elems < 2**31, "kernels index the planes with int32"
    pitch, segment = _int32(layout.widths), ranges.segment
    rows = (ranges.row_start - seg_indptr[segment]) * layout.widths[segment]
    return [
        RunPlanes(
            tuple(run),
            _sum(ranks, run),
            pitch,
            _int32(layout.starts[segment] + rows + layout.columns[segment, run[0]]),
        )
        for run in runs
    ]


def number(counts: npt.NDArray[np.integer[Any]]) -> tuple[IntArray, IntArray]:
    """Return, for `sum(counts)` entries, whose each one is and its number among its owner's."""
    owners = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    starts = np.cumsum(counts, dtype=np.int32) - counts
    return owners, _int32(np.arange(len(owners), dtype=np.int32) - starts[owners])


def _sum(ranks: IntArray, run: Sequence[int]) -> IntArray:
    return _int32(ranks[:, list(run)].sum(axis=1))


def _int32(array: npt.NDArray[np.integer[Any]]) -> IntArray:
    return array.astype(np.int32)
