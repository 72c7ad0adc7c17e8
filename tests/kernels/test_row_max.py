"""Maxima of rows: torch's values, the first of equals, and NaN where there is one."""

from __future__ import annotations

import pytest
import torch

from loraplex_kernels.row_max import row_max


@pytest.mark.parametrize("width", [1, 15, 16, 511, 512, 513, 49152])
@pytest.mark.parametrize("num_rows", [1, 3, 32])
def test_values_and_first_places_are_torchs(num_rows, width):
    rows = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(width)).round()
    values, ids = row_max(rows)
    assert torch.equal(values, rows.amax(-1))
    assert ids.tolist() == [row.tolist().index(max(row.tolist())) for row in rows]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 17, 600, 1023])
def test_values_that_are_not_finite_stay_in_their_row(value, place):
    rows = torch.randn(3, 1024, generator=torch.Generator().manual_seed(0))
    rows[1, place] = value
    values, ids = row_max(rows)
    torch.testing.assert_close(values, rows.amax(-1), rtol=0, atol=0, equal_nan=True)
    assert ids[[0, 2]].tolist() == rows.argmax(-1)[[0, 2]].tolist()


def test_a_row_of_nothing_but_minus_infinity_has_a_place():
    values, ids = row_max(torch.full((2, 700), float("-inf")))
    assert values.tolist() == [float("-inf")] * 2
    assert all(0 <= i < 700 for i in ids.tolist())
