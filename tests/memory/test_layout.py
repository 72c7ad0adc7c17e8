"""Page geometry on the models we support."""

from __future__ import annotations

from itertools import pairwise

import pytest

from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_memory.layout import PROJECTIONS, ModelGeometry, PoolLayout

MODELS = {
    "SmolLM2-135M": ModelGeometry(30, 576, 9, 3, 64, 1536),
    "Llama-2-7B": ModelGeometry(32, 4096, 32, 32, 128, 11008),
    "Llama-3-8B": ModelGeometry(32, 4096, 32, 8, 128, 14336),
    "Qwen2.5-0.5B": ModelGeometry(24, 896, 14, 2, 64, 4864),
    "Qwen2.5-7B": ModelGeometry(28, 3584, 28, 4, 128, 18944),
    "Qwen3-8B": ModelGeometry(36, 4096, 32, 8, 128, 12288),
    "Phi-3-mini": ModelGeometry(32, 3072, 32, 32, 96, 8192),
}


@pytest.mark.parametrize("geometry", MODELS.values(), ids=MODELS)
def test_chunks_are_long_enough_to_read_and_never_cross_a_page(geometry):
    layout = PoolLayout(geometry)
    assert layout.chunk_elems % 64 == 0
    assert layout.page_elems % layout.chunk_elems == 0
    for projection in PROJECTIONS:
        assert geometry.in_features(projection) % layout.chunk_elems == 0
        assert geometry.out_features(projection) % layout.chunk_elems == 0


@pytest.mark.parametrize("geometry", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 64])
def test_only_the_last_page_has_room_left(geometry, rank):
    layout = PoolLayout(geometry)
    adapter = AdapterLayout(layout, AdapterSpec(((rank,) * 7,) * geometry.num_layers))
    room = adapter.num_pages * layout.page_elems * geometry.num_layers - adapter.num_elems
    assert 0 <= room < layout.page_elems * geometry.num_layers


def test_no_row_is_padded():
    for name, geometry in MODELS.items():
        layout = PoolLayout(geometry)
        adapter = AdapterLayout(layout, AdapterSpec(((64,) * 7,) * geometry.num_layers))
        row = sum(geometry.in_features(p) + geometry.out_features(p) for p in PROJECTIONS)
        assert adapter.num_elems == 64 * row * geometry.num_layers, name


def test_matrices_of_one_layer_do_not_overlap():
    layout = PoolLayout(MODELS["SmolLM2-135M"])
    ranks = ((3, 0, 5, 8, 1, 0, 64),) * 30
    adapter = AdapterLayout(layout, AdapterSpec(ranks))
    spans = []
    for index, projection in enumerate(PROJECTIONS):
        rank, geometry = ranks[0][index], layout.geometry
        for start, width in (
            (adapter.a_chunks[0][index], geometry.in_features(projection)),
            (adapter.b_chunks[0][index], geometry.out_features(projection)),
        ):
            spans.append((start, start + rank * width // layout.chunk_elems))
    spans = sorted(s for s in spans if s[0] != s[1])
    assert all(a[1] == b[0] for a, b in pairwise(spans))


def test_ranks_of_another_depth_are_refused():
    with pytest.raises(ValueError, match="30"):
        AdapterLayout(PoolLayout(MODELS["SmolLM2-135M"]), AdapterSpec(((1,) * 7,) * 12))
