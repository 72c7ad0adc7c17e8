"""Cutting a model: every head, column and rank row is on the ranks that need it, once."""

from __future__ import annotations

import pytest
import torch

from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_memory.adapter_weights import AdapterWeights, LoRAPair
from loraplex_memory.layout import PROJECTIONS, ModelGeometry, PoolLayout
from loraplex_memory.packing import pack_adapter
from loraplex_memory.partition import ROW_PARALLEL, Partition
from loraplex_memory.sharding import own_pair

GEOMETRIES = {
    "smollm2": ModelGeometry(2, 576, 9, 3, 64, 1536),
    "llama-3-8b": ModelGeometry(2, 4096, 32, 8, 128, 14336),
    "multi-query": ModelGeometry(2, 64, 4, 1, 16, 96),
    "odd": ModelGeometry(2, 60, 5, 5, 12, 100),
}


@pytest.fixture(params=GEOMETRIES, name="geometry")
def _geometry(request):
    return GEOMETRIES[request.param]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_every_query_head_is_on_one_rank_with_the_kv_head_it_reads(geometry, num_ranks):
    partition = Partition(geometry, num_ranks)
    group = geometry.num_heads // geometry.num_kv_heads
    seen = []
    for rank in range(num_ranks):
        heads, kv_heads = partition.heads(rank), partition.kv_heads(rank)
        shard = partition.shard
        assert (heads.width, kv_heads.width) == (shard.num_heads, shard.num_kv_heads)
        # A kernel reads KV head h // (heads / kv_heads) of the shard, padding included.
        for at, head in enumerate(range(heads.start, heads.stop)):
            own_kv = at // (shard.num_heads // shard.num_kv_heads)
            assert kv_heads.start + own_kv == head // group
            assert own_kv < kv_heads.stop - kv_heads.start
            seen.append(head)
    assert sorted(seen) == list(range(geometry.num_heads))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_the_parts_of_a_pair_give_its_update(geometry, num_ranks, projection):
    """As the ranks compute it: A by rows and gathered, or by inputs and summed; B by outputs."""
    generator = torch.Generator().manual_seed(0)
    lora_rank, partition = 5, Partition(geometry, num_ranks)
    d_in, d_out = geometry.in_features(projection), geometry.out_features(projection)
    a, b, x = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((lora_rank, d_in), (d_out, lora_rank), (3, d_in))
    )
    pairs = [
        own_pair(LoRAPair(a, b, 1.0), projection, partition, rank) for rank in range(num_ranks)
    ]
    shrunk = []
    for rank, pair in enumerate(pairs):
        cut = partition.inputs(projection, rank)
        own = torch.nn.functional.pad(x[:, cut.start : cut.stop], (0, cut.padding))
        shrunk.append(own @ pair.a.T)
    if projection in ROW_PARALLEL:
        whole = torch.stack(shrunk).sum(0)
    else:
        whole = torch.cat(shrunk, dim=1)[:, :lora_rank]
    update = torch.zeros(3, d_out, dtype=torch.float64)
    for rank, pair in enumerate(pairs):
        cut = partition.outputs(projection, rank)
        # Where ranks share a KV head, each computes it.
        update[:, cut.start : cut.stop] = (whole @ pair.b.T)[:, : cut.stop - cut.start]
    torch.testing.assert_close(update, x @ a.T @ b.T)


def test_a_part_takes_its_share_of_the_pages():
    """On an even cut nothing is on two ranks but what rounding up to pages costs."""
    geometry, spec = GEOMETRIES["llama-3-8b"], AdapterSpec(((16,) * 7,) * 2)
    whole = AdapterLayout(PoolLayout(geometry), spec).num_elems
    for num_ranks in (2, 4, 8):
        part = AdapterLayout(PoolLayout(geometry, num_ranks=num_ranks), spec)
        assert part.num_elems * num_ranks == whole


@pytest.mark.parametrize("num_ranks", [3, 5, 6, 7])
def test_what_does_not_divide_leaves_no_chunks_of_an_element(num_ranks):
    assert PoolLayout(GEOMETRIES["llama-3-8b"], num_ranks=num_ranks).chunk_elems >= 32


def test_one_rank_packs_what_it_always_did():
    geometry = GEOMETRIES["multi-query"]
    a, b = torch.randn(3, 64), torch.randn(64, 3)
    weights = AdapterWeights({(0, "q"): LoRAPair(a, b, 2.0)})
    layout = AdapterLayout(PoolLayout(geometry), weights.spec(2))
    packed = pack_adapter(weights, layout, dtype=torch.float32)[0].flatten()
    assert torch.equal(packed[: 3 * 64], a.flatten())
    assert torch.equal(packed[3 * 64 : 6 * 64], (2.0 * b.T).flatten())


def test_a_model_is_cut_for_at_least_one_rank():
    with pytest.raises(ValueError, match="at least 1 rank"):
        Partition(GEOMETRIES["odd"], 0)


def test_padding_is_told():
    assert Partition(GEOMETRIES["llama-3-8b"], 8).padded_share == 0.0
    # 12 heads' width for 9, the MLP cut evenly: 192 of 2304 columns.
    assert Partition(GEOMETRIES["smollm2"], 4).padded_share == pytest.approx(192 / 2304)
