"""One rank's part of an adapter's numbers, as the pages of that rank hold them.

S-LoRA's partition (arXiv 2311.03285, section 6): A of column-parallel linears is cut over its rank
rows, A of row-parallel ones over its inputs, and B of both over its outputs.
Scales, biases and prefixes follow the linear that they belong to. All else is whole on each rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from loraplex_memory.adapter_spec import EPILOGUE_PARTS, KV_PREFIX, ROW_PARALLEL_PARTS, in_scale
from loraplex_memory.adapter_weights import AdapterWeights, LoRAPair
from loraplex_memory.layout import PROJECTIONS, SITES, Projection
from loraplex_memory.partition import Cut, Partition


def own_part(weights: AdapterWeights, partition: Partition, rank: int) -> AdapterWeights:
    """Return the part of `rank`; views of `weights` but where zeros are added.

    Its pairs are not whole matrices: A may have fewer rank rows than B has columns.
    """
    if partition.num_ranks == 1:
        return weights
    lora = {
        (layer, p): own_pair(pair, p, partition, rank) for (layer, p), pair in weights.lora.items()
    }
    parts = {
        (name, layer): _own_matrix(name, matrix, partition, rank)
        for (name, layer), matrix in weights.parts.items()
    }
    return AdapterWeights(
        lora,
        parts,
        weights.token_ids,
        weights.head_token_ids,
        weights.invocation_token_ids,
    )


def own_pair(pair: LoRAPair, projection: Projection, partition: Partition, rank: int) -> LoRAPair:
    """Return A `[a_ranks, in]` and B `[out, R]` of one rank."""
    a = take(pair.a, partition.a_ranks(projection, pair.rank, rank), dim=0)
    a = take(a, partition.inputs(projection, rank), dim=1)
    return LoRAPair(a, take(pair.b, partition.outputs(projection, rank), dim=0), pair.scale)


def take(matrix: torch.Tensor, cut: Cut, *, dim: int) -> torch.Tensor:
    """Return the rows (`dim` 0) or columns (`dim` 1) of a cut, with zeros up to its width."""
    own = matrix.narrow(dim, cut.start, cut.stop - cut.start)
    if not cut.padding:
        return own
    return F.pad(own, (0, 0, 0, cut.padding) if dim == 0 else (0, cut.padding))


def _own_matrix(name: str, matrix: torch.Tensor, partition: Partition, rank: int) -> torch.Tensor:
    if name == KV_PREFIX:
        return _own_heads(matrix, partition, rank)
    if name in EPILOGUE_PARTS - ROW_PARALLEL_PARTS:
        projection = next(p for p in PROJECTIONS if p == name.partition(".")[2])
        return take(matrix, partition.outputs(projection, rank), dim=1)
    for site, (first, *_) in SITES.items():
        if name == in_scale(site):
            return take(matrix, partition.inputs(first, rank), dim=1)
    return matrix


def _own_heads(prefix: torch.Tensor, partition: Partition, rank: int) -> torch.Tensor:
    """Return the KV heads of a rank of keys and values `[n, 2 * kv_heads * head_dim]`."""
    cut = partition.outputs("k", rank)
    both = [take(half, cut, dim=1) for half in prefix.chunk(2, dim=1)]
    return torch.cat(both, dim=1)
