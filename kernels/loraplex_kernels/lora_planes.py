"""Where the shrink's outputs lie between the halves of LoRA, and how those of several ranks join.

Planes are float32: one row for each token row of the batch, in the order of its `row_ids`, as wide
as the ranks of its adapter's modules at the site together. Nothing is padded, so what a collective
sends is what the adapters have.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Self

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

#: Mixes of ranks whose order is remembered: adapters are of few kinds.
_MAX_KINDS: Final = 256


@dataclass(frozen=True)
class PlaneLayout:
    """Of one site of one layer; all arrays are int64.

    Attributes:
        starts: `[G]`, first element of each segment.
        widths: `[G]`, elements of one of its rows.
        columns: `[G, modules]`, where each module begins in a row.
        num_elems: elements of all segments.
    """

    starts: Int64Array
    widths: Int64Array
    columns: Int64Array
    num_elems: int

    @classmethod
    def of(cls, seg_indptr: npt.NDArray[np.int32], ranks: npt.NDArray[np.int32]) -> Self:
        """Lay out segments of `seg_indptr` `[G + 1]` with modules of `ranks` `[G, modules]`."""
        ends = np.cumsum(ranks, axis=1, dtype=np.int64)
        widths = ends[:, -1]
        stops = np.cumsum(np.diff(seg_indptr) * widths)
        num_elems = int(stops[-1]) if stops.size else 0
        starts = np.concatenate(([0], stops[:-1])) if stops.size else stops
        return cls(starts.astype(np.int64), widths, ends - ranks, num_elems)


def gather_order(
    seg_indptr: npt.NDArray[np.int32],
    ranks: npt.NDArray[np.int32],
    cut_ranks: npt.NDArray[np.int32],
    num_ranks: int,
    pitch: int | None = None,
) -> Int64Array:
    """Return which element of the gathered planes each element of the whole planes is.

    Rank `i` of the `num_ranks` has rank rows `[i c, (i + 1) c)` of each module.

    Args:
        seg_indptr: `[G + 1]`.
        ranks: `[G, modules]`, of the adapters.
        cut_ranks: `[G, modules]`, `c`: what each rank shrinks to, padding included.
        pitch: elements that each rank sent, where there are more than it has planes.

    Returns:
        int64 `[E]` into `[num_ranks, E']`, flat: the planes of every rank, one after the other.
    """
    own = PlaneLayout.of(seg_indptr, cut_ranks)
    sent = own.num_elems if pitch is None else pitch
    assert own.num_elems <= sent
    pieces = [np.zeros(0, dtype=np.int64)]
    for g, num_rows in enumerate(np.diff(seg_indptr).tolist()):
        owner, within = _row_order(tuple(ranks[g].tolist()), tuple(cut_ranks[g].tolist()))
        rows = own.starts[g] + np.arange(num_rows)[:, None] * own.widths[g]
        pieces.append((rows + (owner * sent + within)).ravel())
    order = np.concatenate(pieces)
    assert not order.size or order.max() < num_ranks * sent, "each rank has its share"
    return order


@lru_cache(_MAX_KINDS)
def _row_order(ranks: tuple[int, ...], cut_ranks: tuple[int, ...]) -> tuple[Int64Array, Int64Array]:
    """Return whose each element of a row is, and its place in that one's row."""
    owners, places, column = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)], 0
    for rank, cut in zip(ranks, cut_ranks, strict=True):
        at = np.arange(rank, dtype=np.int64)
        owners.append(at // max(cut, 1))
        places.append(column + at % max(cut, 1))
        column += cut
    return np.concatenate(owners), np.concatenate(places)
