"""Planes between the halves: nothing between rows, and every rank row of every device found."""

from __future__ import annotations

import numpy as np
import pytest

from loraplex_kernels.lora_planes import PlaneLayout, gather_order

INDPTR = np.array([0, 3, 4, 6], dtype=np.int32)
RANKS = np.array([[5, 0, 1], [0, 0, 0], [2, 16, 3]], dtype=np.int32)


def whole_planes():
    """Return a number for each row, module and rank row, laid out by hand."""
    values, row = [], 0
    for g, ranks in enumerate(RANKS):
        for _ in range(INDPTR[g + 1] - INDPTR[g]):
            for module, rank in enumerate(ranks):
                values += [10_000 * row + 100 * module + j for j in range(rank)]
            row += 1
    return np.array(values)


def cut_planes(rank, cut_ranks, pitch):
    """Return what one of several devices sends: its share of each module's rank rows."""
    values, row = [], 0
    for g, ranks in enumerate(RANKS):
        for _ in range(INDPTR[g + 1] - INDPTR[g]):
            for module, (whole, cut) in enumerate(zip(ranks, cut_ranks[g], strict=True)):
                first = 10_000 * row + 100 * module
                mine = range(rank * cut, (rank + 1) * cut)
                values += [first + j if j < whole else -1 for j in mine]
            row += 1
    return np.array(values + [-2] * (pitch - len(values)))


def test_rows_lie_one_behind_the_other_as_wide_as_their_ranks():
    layout = PlaneLayout.of(INDPTR, RANKS)
    assert layout.starts.tolist() == [0, 18, 18]
    assert layout.widths.tolist() == [6, 0, 21]
    assert layout.columns.tolist() == [[0, 5, 5], [0, 0, 0], [0, 2, 18]]
    assert layout.num_elems == len(whole_planes()) == 3 * 6 + 2 * 21


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 7])
@pytest.mark.parametrize("spare", [0, 13])
def test_the_order_finds_every_rank_row_and_no_padding(num_ranks, spare):
    cut_ranks = -(-RANKS // num_ranks)
    pitch = PlaneLayout.of(INDPTR, cut_ranks).num_elems + spare
    gathered = np.concatenate([cut_planes(r, cut_ranks, pitch) for r in range(num_ranks)])
    order = gather_order(INDPTR, RANKS, cut_ranks, num_ranks, pitch if spare else None)
    assert np.array_equal(gathered[order], whole_planes())
