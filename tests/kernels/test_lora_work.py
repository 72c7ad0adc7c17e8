"""The flat work list: every row, rank and module once, and nothing for what is not there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from loraplex_kernels.batch import PagedAdapter, build_lora_batch
from loraplex_kernels.lora_shape import LoRAShape, LoRATuning
from loraplex_kernels.lora_work import LoRAWork, build_lora_work, no_lora_work
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_memory.layout import SITES, ModelGeometry, PoolLayout
from loraplex_server.model.transformer import lora_site
from tests.support.kernel_cases import SMALL, SMOLLM2
from tests.support.lora_cases import SHORT_PARTS, site_shapes

DEEP = replace(SMALL, num_layers=6)
ARRAYS = ("rows", "pages", "spans", "items")


def make_batch(ranks, rows, geometry=DEEP):
    """Return the batch of adapters with `ranks[g]` per projection or per layer and projection."""
    layout = PoolLayout(geometry)
    adapters = []
    for row in ranks:
        by_layer = row if isinstance(row[0], list) else [row] * geometry.num_layers
        adapter = AdapterLayout(layout, AdapterSpec(tuple(map(tuple, by_layer))))
        pages = range(100 * len(adapters), 100 * len(adapters) + adapter.num_pages)
        adapters.append(PagedAdapter(pages, adapter.ranks, adapter.a_chunks, adapter.b_chunks))
    return build_lora_batch(adapters, rows, layout.chunk_elems)


def build(ranks, rows, *, geometry=DEEP, tuning=SHORT_PARTS) -> LoRAWork:
    return build_lora_work(
        make_batch(ranks, rows, geometry), site_shapes(PoolLayout(geometry), tuning)
    )


def items_of(work: LoRAWork, layer: int, site: int, launch: int) -> np.ndarray:
    first, count = work.spans[layer, site, launch]
    return work.items[first : first + count]


RAGGED = [[8, 0, 3, 16, 1, 64, 200], [0, 0, 0, 5, 0, 0, 0], [16] * 7]
ROWS = [list(range(0, 260, 2)), [1], [3, 5, 7]]


def test_every_row_meets_every_rank_of_its_adapter_once():
    work = build(RAGGED, ROWS)
    for site, names in enumerate(SITES.values()):
        width = len(names)
        first_module = sum(len(n) for n in list(SITES.values())[:site])
        shrunk = {}
        for row_start, row_count, _, _, ranks, *_ in items_of(work, 0, site, 0):
            for row in work.rows[row_start : row_start + row_count]:
                shrunk[row] = shrunk.get(row, 0) + ranks
        expanded = {}
        for position in range(width):
            for row_start, row_count, _, _, rank, *_ in items_of(work, 0, site, 1 + position):
                for row in work.rows[row_start : row_start + row_count]:
                    expanded[row] = expanded.get(row, 0) + rank
        expected = {
            row: total
            for ranks, rows in zip(RAGGED, ROWS, strict=True)
            for row in rows
            if (total := sum(ranks[first_module : first_module + width]))
        }
        assert shrunk == expected
        assert expanded == expected


def test_planes_of_a_site_do_not_overlap():
    for tuning in (SHORT_PARTS, replace(SHORT_PARTS, serial_rows=1)):
        work = build(RAGGED, ROWS, tuning=tuning)
        shapes = site_shapes(PoolLayout(DEEP), tuning)
        for shape in shapes:
            written = np.zeros(work.plane_elems, dtype=np.int32)
            read = np.zeros(work.plane_elems, dtype=np.int32)
            parts = 1 if work.is_serial else shape.num_parts
            launches = ((0, written), *((1 + p, read) for p in range(len(shape.modules))))
            for launch, counts in launches:
                for item in items_of(work, 0, shape.index, launch):
                    _, row_count, _, _, ranks, start, pitch, _ = item
                    for row in range(parts * row_count):
                        counts[start + row * pitch : start + row * pitch + ranks] += 1
            assert written.max() == 1
            assert np.array_equal(written, read)


def test_long_segments_are_cut_into_ranges_of_64_rows():
    work = build(RAGGED, ROWS)
    counts = items_of(work, 0, 1, 1)[:, 1].tolist()
    assert counts == [64, 64, 2, 1, 3]


def test_equal_layers_share_their_items():
    work = build(RAGGED, ROWS)
    assert (work.spans == work.spans[:1]).all()
    assert len(work.items) == work.spans[0, ..., 1].sum()


def test_layers_that_differ_have_items_of_their_own():
    varied = [[8] * 7, [0, 8, 0, 0, 0, 0, 0]]
    work = build([[varied[layer % 2] for layer in range(6)]], [[0]])
    assert np.array_equal(work.spans[0], work.spans[4])
    assert np.array_equal(work.spans[1], work.spans[5])
    assert not np.array_equal(work.spans[0], work.spans[1])
    assert items_of(work, 1, 0, 2)[0, 4] == 8
    assert all(len(items_of(work, 1, site, 0)) == 0 for site in (1, 2, 3))


def test_an_absent_module_has_no_item():
    work = build([[0, 4, 0, 0, 0, 0, 0], [0] * 7], [[0], [1]])
    assert work.spans[0, ..., 1].tolist() == [[1, 0, 1, 0], [0] * 4, [0] * 4, [0] * 4]


def test_rank_rows_of_a_site_fill_tiles_together():
    work = build([[5, 5, 5, 5, 8, 8, 1]], [[0]])
    assert items_of(work, 0, 0, 0)[:, 4].tolist() == [15]
    assert items_of(work, 0, 2, 0)[:, 4].tolist() == [16]


def test_matrices_that_do_not_follow_one_another_have_tiles_of_their_own():
    layout = PoolLayout(SMALL)
    tables = np.array(
        [[[5, 5, 5, 0, 0, 0, 0]], [[0, 40, 80, 0, 0, 0, 0]], [[16, 60, 100] + [0] * 4]]
    )
    batch = build_lora_batch([PagedAdapter([3, 4, 5, 6], *tables)], [[0]], layout.chunk_elems)
    work = build_lora_work(batch, site_shapes(layout)[:1])
    assert items_of(work, 0, 0, 0)[:, 4].tolist() == [5, 5, 5]
    assert items_of(work, 0, 0, 0)[:, 3].tolist() == [0, 40 * 32, 80 * 32]


def test_a_large_step_adds_its_k_parts_in_the_program():
    tuning = LoRATuning(serial_rows=100, serial_rank_tile=32)
    split = build([[40] * 7], [list(range(99))], tuning=tuning)
    serial = build([[40] * 7], [list(range(100))], tuning=tuning)
    assert (split.is_serial, serial.is_serial) == (False, True)
    assert items_of(split, 0, 1, 0)[:, 4].tolist() == [16, 16, 8] * 2
    assert items_of(serial, 0, 1, 0)[:, 4].tolist() == [32, 8] * 2
    assert serial.plane_elems == 128 * 100  # gate and up: 80 ranks, rounded up to whole tiles


def test_planes_stay_within_64_mb_in_the_largest_steps():
    geometry = ModelGeometry(1, 4096, 32, 8, 128, 14336)
    for num_rows, ranks in ((1023, [64] * 7), (8192, [64] * 7), (1023, [128, 128, 0, 0, 0, 0, 0])):
        work = build([ranks], [list(range(num_rows))], geometry=geometry, tuning=LoRATuning())
        assert work.plane_elems * 4 <= 64 << 20


def test_building_is_deterministic():
    once, again = build(RAGGED, ROWS), build(RAGGED, ROWS)
    for name in ARRAYS:
        array = getattr(once, name)
        assert array.dtype == np.int32
        assert array.flags.c_contiguous
        assert np.array_equal(array, getattr(again, name))


def test_no_rows_mean_no_items():
    work = no_lora_work(6, 4)
    assert work.spans.shape == (6, 4, 4, 2)
    assert not work.spans.any()
    assert len(work.items) == len(work.rows) == work.plane_elems == 0
    tables = work.to(torch.device("cpu"))
    assert tables.items.shape == (0, 8)


def test_tables_on_the_device_are_the_arrays():
    work = build(RAGGED, ROWS)
    tables = work.to(torch.device("cpu"))
    for name in ARRAYS:
        tensor = getattr(tables, name)
        assert np.array_equal(tensor.numpy(), getattr(work, name))
        assert tensor.data_ptr() % 64 == tables.rows.data_ptr() % 64
    assert tables.planes.shape == (work.plane_elems,)


@pytest.mark.parametrize("geometry", [SMALL, SMOLLM2, ModelGeometry(1, 4096, 32, 32, 128, 11008)])
def test_parts_depend_on_the_shape_alone_and_cover_k(geometry):
    for shape in site_shapes(PoolLayout(geometry), LoRATuning()):
        assert shape.part_elems % shape.block_k == 0
        assert shape.part_elems <= shape.page_elems
        assert (shape.num_parts - 1) * shape.part_elems < shape.in_features
        assert shape.num_parts * shape.part_elems >= shape.in_features
        assert shape.chunk_elems % shape.block_k == 0
        assert shape.chunk_elems % shape.block_n == 0


@pytest.mark.parametrize(("num_ranks", "chunk_elems", "block"), [(2, 32, 32), (4, 16, 16)])
def test_tiles_of_a_cut_model_are_as_narrow_as_its_chunks(num_ranks, chunk_elems, block):
    layout = PoolLayout(SMOLLM2, num_ranks=num_ranks)
    assert layout.chunk_elems == chunk_elems
    for site in SITES:
        shape = LoRAShape.of(
            lora_site(site, layout.partition),
            chunk_elems=layout.chunk_elems,
            page_elems=layout.page_elems,
        )
        assert shape.is_tiled
        assert (shape.block_k, shape.block_n) == (block, block)
        assert shape.part_elems <= shape.page_elems
        assert all(width % block == 0 for width in (shape.in_features, *shape.out_features))


@pytest.mark.parametrize("num_ranks", [3, 5, 6, 7])
@pytest.mark.parametrize("geometry", [SMOLLM2, ModelGeometry(1, 4096, 32, 8, 128, 14336)])
def test_a_model_that_does_not_divide_is_padded_to_what_tiles_read(geometry, num_ranks):
    layout = PoolLayout(geometry, num_ranks=num_ranks)
    assert layout.chunk_elems % 32 == 0
    site = lora_site("o", layout.partition)
    assert LoRAShape.of(site, chunk_elems=layout.chunk_elems, page_elems=layout.page_elems).is_tiled


def test_a_shape_refuses_what_the_kernels_cannot_do():
    with pytest.raises(ValueError, match="one to three modules"):
        LoRAShape(0, (0, 1), 32, (32,), 32, 1024)
    with pytest.raises(ValueError, match="page border"):
        LoRAShape(0, (0,), 32, (32,), 48, 1024)
