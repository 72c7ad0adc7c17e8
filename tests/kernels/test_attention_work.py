"""The tables of the attention kernels, against plain loops over the sequences of a step."""

from __future__ import annotations

import random
from dataclasses import fields

import numpy as np
import pytest
import torch

from loraplex_kernels.attention_work import (
    NO_SLOT,
    NUM_DECODE_ITEMS,
    NUM_DECODE_SEQUENCES,
    NUM_PREFILL_ITEMS,
    AttentionTiling,
    build_attention_work,
)
from loraplex_kernels.batch import build_attention_batch

PAGE = 16
TILING = AttentionTiling.of(9, 3, 64, elem_bytes=2, split_tokens=64)


def make_step(seed: int, num_decode: int, num_prefill: int):
    rng = random.Random(seed)
    spans = [(rng.randrange(400), 1) for _ in range(num_decode)]
    spans += [(rng.randrange(200), rng.randrange(2, 150)) for _ in range(num_prefill)]
    free = list(range(5000))
    rng.shuffle(free)
    tables = [[free.pop() for _ in range(-(-(s + n) // PAGE))] for s, n in spans]
    return spans, tables


def build(spans, tables, **options):
    batch = build_attention_batch(spans, tables, PAGE)
    return build_attention_work(batch, page_tokens=PAGE, tiling=TILING, **options)


STEPS = {"mixed": (5, 4), "decode": (6, 0), "prefill": (0, 3), "one token": (1, 0)}


@pytest.fixture(params=STEPS.values(), ids=STEPS)
def step(request):
    return make_step(1, *request.param)


def test_every_table_is_a_contiguous_int32_array(step):
    work = build(*step)
    for field in fields(work):
        table = getattr(work, field.name)
        assert table.dtype == np.int32
        assert table.flags.c_contiguous


def test_pages_are_the_block_tables_one_after_the_other(step):
    spans, tables = step
    work = build(spans, tables)
    assert work.pages.tolist() == [page for table in tables for page in table]
    for table, start in zip(tables, work.page_start, strict=True):
        assert work.pages[start : start + len(table)].tolist() == table


def test_pages_beyond_the_context_are_left_out():
    work = build([(3, 1), (0, 17)], [[5, 6, 7], [1, 2, 3]])
    assert work.pages.tolist() == [5, 1, 2]


def test_decode_items_cover_each_context_once_and_in_order(step):
    spans, tables = step
    work = build(spans, tables)
    contexts = [start + 1 for start, count in spans if count == 1]
    expected = [(s, i) for s, c in enumerate(contexts) for i in range(-(-c // TILING.split_tokens))]
    assert [tuple(item) for item in work.decode_items.tolist()] == expected
    assert work.counts[NUM_DECODE_ITEMS] == len(expected)
    assert work.counts[NUM_DECODE_SEQUENCES] == len(contexts)
    for s in range(len(contexts)):
        owned = work.decode_items[work.item_start[s] : work.item_start[s + 1]]
        assert set(owned[:, 0].tolist()) == {s}


def test_prefill_items_cover_each_new_query_once(step):
    spans, tables = step
    work = build(spans, tables)
    tile = TILING.query_tile
    covered = sorted(
        (s, position)
        for s, t in work.prefill_items.tolist()
        for position in range(t * tile, (t + 1) * tile)
        if spans[s][0] <= position < sum(spans[s])
    )
    assert covered == [
        (s, position)
        for s, (start, count) in enumerate(spans)
        if count > 1
        for position in range(start, start + count)
    ]
    assert work.counts[NUM_PREFILL_ITEMS] == len(work.prefill_items)
    assert all(sum(spans[s]) > t * tile for s, t in work.prefill_items.tolist())


def test_the_longest_prefill_items_start_first():
    tiles = build(*make_step(2, 1, 6)).prefill_items[:, 1]
    assert (np.diff(tiles) <= 0).all()


def test_rows_know_their_position_and_slot(step):
    spans, tables = step
    work = build(spans, tables)
    row = 0
    for s, ((start, count), table) in enumerate(zip(spans, tables, strict=True)):
        assert work.query_start[s] == row
        for position in range(start, start + count):
            assert work.positions[row] == position
            assert work.slots[row] == table[position // PAGE] * PAGE + position % PAGE
            row += 1
    assert work.query_start[-1] == row


def test_padding_rows_write_nothing():
    work = build([(3, 1)], [[7]], num_rows=4)
    assert work.positions.tolist() == [3, 0, 0, 0]
    assert work.slots.tolist() == [7 * PAGE + 3, NO_SLOT, NO_SLOT, NO_SLOT]
    with pytest.raises(AssertionError, match="more tokens than rows"):
        build([(0, 5)], [[7]], num_rows=4)


def test_tables_on_the_device_are_the_arrays(step):
    work = build(*step)
    tables = work.to(torch.device("cpu"))
    for field in fields(work):
        table = getattr(tables, field.name)
        assert table.dtype == torch.int32
        assert np.array_equal(table.numpy(), getattr(work, field.name))


@pytest.mark.parametrize("elem_bytes", [2, 4])
@pytest.mark.parametrize("head_dim", [20, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (32, 8), (32, 32), (40, 2), (71, 1)])
@pytest.mark.parametrize("capability", [80, 90])
def test_tiles_fit_any_model(heads, kv_heads, head_dim, elem_bytes, capability):
    tiling = AttentionTiling.of(
        heads, kv_heads, head_dim, elem_bytes=elem_bytes, capability=capability
    )
    groups = heads // kv_heads
    assert tiling.head_dim_padded >= head_dim
    assert tiling.head_tile >= groups
    assert tiling.split_tokens % tiling.decode_tokens == 0
    assert tiling.prefill_rows >= tiling.query_tile * groups > tiling.prefill_rows - groups
    powers = (tiling.head_tile, tiling.decode_tokens, tiling.prefill_rows, tiling.prefill_tokens)
    assert all(n >= 16 and n & (n - 1) == 0 for n in powers)
