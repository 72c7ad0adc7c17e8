"""The traffic model: bounded padding at real shapes, and a count of every element touched."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from loraplex_kernels.lora_shape import ROW_TILE, LoRATuning
from loraplex_kernels.lora_traffic import launch_traffic, rival_weight_bytes, traffic_table
from loraplex_kernels.lora_work import build_lora_work
from loraplex_memory.layout import PROJECTIONS, PoolLayout
from tests.support.kernel_cases import ODD, SMALL, SMOLLM2, make_lora_case
from tests.support.lora_cases import POPULARITY, SHORT_PARTS, site_shapes, spread

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels/bench"))

from print_traffic import MIXES, MODELS, make_batch


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("model", MODELS)
def test_padding_is_at_most_two_percent_of_true_rank_bytes(model, mix):
    layout = PoolLayout(MODELS[model])
    ranks, modules = MIXES[mix]
    adapters = [[ranks[g % len(ranks)] * used for used in modules] for g in range(64)]
    batch = make_batch(layout, adapters, [[g] for g in range(64)])
    shapes = site_shapes(layout, LoRATuning())
    work = build_lora_work(batch, shapes)
    launches = launch_traffic(batch, work, shapes, layer=0, elem_bytes=2)
    total = sum(list(launches.values())[1:], next(iter(launches.values())))
    rivals = rival_weight_bytes(
        batch, shapes, layer=0, elem_bytes=2, slot_rank=max(map(max, adapters))
    )
    print(f"\n{model}, {mix}, 64 distinct\n{traffic_table(launches)}\n{rivals}")
    assert all(0 <= traffic.padding <= 0.02 for traffic in launches.values())
    assert total.must_weights == rivals["true ranks"]
    assert total.reread_weights == 0  # no adapter has more rows than a tile
    assert total.index <= 0.08 * total.must_weights  # asked of L1, a record at a time
    assert work.items.nbytes + work.pages.nbytes <= 0.005 * total.must_weights


def test_long_segments_read_weights_again_only_from_caches():
    layout = PoolLayout(MODELS["Llama-3-8B"])
    shapes = site_shapes(layout, LoRATuning())
    batch = make_batch(layout, [[16] * 7], [list(range(1000))])
    launches = launch_traffic(batch, build_lora_work(batch, shapes), shapes, layer=0, elem_bytes=2)
    for traffic in launches.values():
        assert traffic.weights == traffic.must_weights
        assert traffic.reread_weights == traffic.weights * (-(-1000 // ROW_TILE) - 1)


@pytest.mark.parametrize("geometry", [SMALL, ODD, SMOLLM2], ids=["small", "odd", "SmolLM2"])
@pytest.mark.parametrize("popularity", ["distinct", "ragged prefill"])
@pytest.mark.parametrize("ranks", ["rank 8", "mixed ranks", "rank 200"])
def test_the_model_agrees_with_a_count_of_every_element(geometry, popularity, ranks):
    rows = POPULARITY[popularity]
    case = make_lora_case(spread(ranks, len(rows)), rows, geometry=geometry)
    shapes = site_shapes(case.pool.layout, SHORT_PARTS)
    work = build_lora_work(case.batch, shapes)
    for layer in (0, 1):
        launches = launch_traffic(case.batch, work, shapes, layer=layer, elem_bytes=1)
        assert len(launches) == 8
        touched = np.zeros((case.pool.num_pages, case.pool.layout.page_elems), dtype=np.int64)
        for shape in shapes:
            for kind, count in (("shrink", count_shrink), ("expand", count_expand)):
                traffic = launches[f"site {shape.index} {kind}"]
                before = touched.copy()
                count(touched, work, shape, layer)
                reads = touched - before
                assert (reads > 0).sum() == traffic.weights == traffic.must_weights
                assert reads.sum() - (reads > 0).sum() == traffic.reread_weights
        # What was read is what the adapters have: the rest of the pool is NaN or another layer's.
        is_weight = ~torch.isnan(case.pool.layer(layer)).numpy()
        assert not (touched[~is_weight] > 0).any()


def count_shrink(touched, work, shape, layer):
    """Count the elements of A that the kernel's own index arithmetic reaches."""
    first, count = work.spans[layer, shape.index, 0]
    pitch = shape.row_pitch(shape.in_features)
    for item in work.items[first : first + count]:
        _, row_count, pages_start, weight_start, num_ranks, *_ = item
        for _ in range(0, row_count, ROW_TILE):
            for part in range(shape.num_parts):
                k0 = part * shape.part_elems
                k_len = min(shape.part_elems, shape.in_features - k0)
                for rank in range(num_ranks):
                    start = weight_start + rank * pitch + k0
                    ends = (start, start + k_len - 1)
                    pages = {e // shape.page_elems for e in ends}
                    for k in range(0, k_len, shape.block_k):
                        size = min(shape.block_k, k_len - k)
                        if shape.is_tiled:
                            assert (start + k) // shape.page_elems in pages
                        touch(touched, work, shape, pages_start, start + k, size)


def count_expand(touched, work, shape, layer):
    """Count the elements of B that the kernel's own index arithmetic reaches."""
    for position, width in enumerate(shape.out_features):
        first, count = work.spans[layer, shape.index, 1 + position]
        for item in work.items[first : first + count]:
            _, row_count, pages_start, weight_start, num_ranks, *_ = item
            for block in range(shape.blocks[position]):
                size = min(shape.block_n, width - block * shape.block_n)
                for _ in range(0, row_count, ROW_TILE):
                    for rank in range(num_ranks):
                        e = weight_start + rank * shape.row_pitch(width) + block * shape.block_n
                        touch(touched, work, shape, pages_start, e, size)


def touch(touched, work, shape, pages_start, start, size):
    if shape.is_tiled:  # one page id for the whole run, as in the kernel
        page, offset = work.pages[pages_start + start // shape.page_elems], start % shape.page_elems
        touched[page, offset : offset + size] += 1
        return
    for e in range(start, start + size):
        touched[work.pages[pages_start + e // shape.page_elems], e % shape.page_elems] += 1


def test_rivals_read_what_their_designs_imply():
    layout = PoolLayout(SMALL)
    shapes = site_shapes(layout)
    batch = make_batch(layout, [[8] * 7, [0, 2, 0, 0, 0, 0, 0]], [[0, 1, 2], [3]])
    rivals = rival_weight_bytes(batch, shapes, layer=0, elem_bytes=2, slot_rank=64)
    elems = [SMALL.in_features(p) + SMALL.out_features(p) for p in PROJECTIONS]
    assert rivals == {
        "true ranks": 2 * (8 * sum(elems) + 2 * elems[1]),
        "padded slots": 2 * 64 * (sum(elems) + elems[1]),
        "per token": 2 * (3 * 8 * sum(elems) + 2 * elems[1]),
    }


def test_random_ranks_need_no_padding():
    layout = PoolLayout(SMOLLM2)
    shapes = site_shapes(layout, LoRATuning())
    generator = random.Random(0)
    for _ in range(20):
        ranks = [[generator.choice(range(65)) for _ in PROJECTIONS] for _ in range(9)]
        batch = make_batch(layout, ranks, [[g] for g in range(9)])
        work = build_lora_work(batch, shapes)
        for traffic in launch_traffic(batch, work, shapes, layer=0, elem_bytes=2).values():
            assert traffic.padding == 0
            assert traffic.activations >= traffic.must_activations
            assert traffic.planes >= traffic.must_planes
            assert traffic.flops >= traffic.must_flops


def test_planes_and_flops_of_a_step_worked_by_hand():
    """17 rows at rank 20: two tiles each way; K = 96 in two parts, N = 96 in three blocks."""
    layout = PoolLayout(SMALL)
    shapes = site_shapes(layout, SHORT_PARTS)
    assert (shapes[1].num_parts, shapes[1].blocks) == (2, (3,))
    batch = make_batch(layout, [[20] * 7], [list(range(17))])
    work = build_lora_work(batch, shapes)
    launches = launch_traffic(batch, work, shapes, layer=0, elem_bytes=2)
    shrink, expand = launches["site 1 shrink"], launches["site 1 expand"]
    assert shrink.must_planes == expand.must_planes == 4 * 17 * 20
    assert shrink.planes == 2 * shrink.must_planes
    assert expand.planes == 3 * 2 * expand.must_planes
    assert shrink.must_flops == expand.must_flops == 2 * 17 * 20 * 96
    assert shrink.flops == expand.flops == 2 * (2 * 16) * (2 * 16) * 96
    assert shrink.activations == 2 * shrink.must_activations == 2 * 2 * 17 * 96
