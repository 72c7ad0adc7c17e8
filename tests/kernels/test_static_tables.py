"""Tables at fixed addresses: what an upload changes, and what it must leave alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraplex_kernels.static_tables import StaticTables, TablesFull, copy_tables

SHAPES = {"big": (10_000,), "items": (50, 4), "spans": (3, 2), "rows": (7,)}


def ints(*shape: int, first: int) -> np.ndarray:
    return np.arange(first, first + np.prod(shape), dtype=np.int32).reshape(shape)


def test_each_table_holds_what_was_uploaded_at_an_address_that_never_changes():
    tables = StaticTables(SHAPES, torch.device("cpu"))
    addresses = {name: view.data_ptr() for name, view in tables.views.items()}
    for step in range(1, 6):
        arrays = {
            "items": ints(step, 4, first=100 * step),
            "rows": ints(step, first=7 * step),
            "big": ints(1000 * step, first=step),
        }
        tables.upload(arrays)
        for name, array in arrays.items():
            filled = tables.views[name].reshape(-1)[: array.size]
            assert filled.tolist() == array.reshape(-1).tolist()
    assert addresses == {name: view.data_ptr() for name, view in tables.views.items()}
    assert all(address % 16 == 0 for address in addresses.values())


def test_a_table_that_is_left_out_keeps_what_it_has():
    tables = StaticTables(SHAPES, torch.device("cpu"))
    kept = ints(3, 2, first=40)
    tables.upload({"spans": kept})
    for step in range(4):
        tables.upload({"items": ints(50, 4, first=step), "rows": ints(7, first=step)})
    assert tables.views["spans"].tolist() == kept.tolist()


def test_a_table_that_is_too_short_says_so_and_nothing_changes():
    tables = StaticTables(SHAPES, torch.device("cpu"))
    tables.upload({"rows": ints(7, first=1)})
    with pytest.raises(TablesFull, match="spans takes 6 elements, the step needs 8"):
        tables.upload({"rows": ints(7, first=9), "spans": ints(4, 2, first=0)})
    assert tables.views["rows"].tolist() == list(range(1, 8))


def test_tables_of_a_step_of_its_own_start_aligned():
    arrays = [ints(size, first=size) for size in (5, 3, 0, 17)] + [ints(2, 3, first=9)]
    tables = copy_tables(arrays, torch.device("cpu"))
    for table, array in zip(tables, arrays, strict=True):
        assert np.array_equal(table.numpy(), array)
        assert table.storage_offset() % 16 == 0
