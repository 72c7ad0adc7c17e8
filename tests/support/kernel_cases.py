"""Random pools, adapters and batches for kernel tests."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from loraplex_kernels.batch import LoRABatch, PagedAdapter, build_lora_batch
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_memory.adapter_weights import AdapterWeights, LoRAPair
from loraplex_memory.layout import PROJECTIONS, ModelGeometry, PoolLayout
from loraplex_memory.packing import pack_adapter
from loraplex_memory.pool import PagePool

SMOLLM2 = ModelGeometry(
    num_layers=2,
    hidden_size=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
)


#: Nothing is a power of two, but chunks are 32 elements: tiles are whole runs.
SMALL = ModelGeometry(
    num_layers=2, hidden_size=96, num_heads=3, num_kv_heads=1, head_dim=32, intermediate_size=224
)

#: Chunks are 20 elements, too short for whole runs: pages are looked up element by element.
ODD = ModelGeometry(
    num_layers=2, hidden_size=40, num_heads=2, num_kv_heads=1, head_dim=20, intermediate_size=60
)


@dataclass(frozen=True)
class LoRACase:
    """A pool holding adapters at scattered pages, and the batch that uses them."""

    pool: PagePool
    weights: list[dict[tuple[int, str], LoRAPair]]
    batch: LoRABatch | None


def make_weights(
    geometry: ModelGeometry, ranks: list[list[int]], generator: torch.Generator
) -> dict[tuple[int, str], LoRAPair]:
    """Return random LoRA pairs of the given ranks (`[layer][projection]`)."""
    weights = {}
    for layer, row in enumerate(ranks):
        for projection, rank in zip(PROJECTIONS, row, strict=True):
            if rank:
                a = torch.randn(rank, geometry.in_features(projection), generator=generator)
                b = torch.randn(geometry.out_features(projection), rank, generator=generator)
                weights[layer, projection] = LoRAPair(a / a.shape[1] ** 0.5, b, 0.5)
    return weights


def make_lora_case(
    adapter_ranks: list[list[list[int]]],
    rows: list[list[int]],
    *,
    geometry: ModelGeometry = SMOLLM2,
    dtype: torch.dtype = torch.float32,
    is_scattered: bool = True,
    seed: int = 0,
    num_ranks: int = 1,
    rank: int = 0,
) -> LoRACase:
    """Pack one adapter per entry of `adapter_ranks` into a pool and build their batch.

    With `num_ranks` the pool is that of `rank`; the weights are whole and the same on all of them.
    """
    generator = torch.Generator().manual_seed(seed)
    layout = PoolLayout(geometry, num_ranks=num_ranks)
    layouts = [
        AdapterLayout(layout, AdapterSpec(tuple(map(tuple, ranks)))) for ranks in adapter_ranks
    ]
    num_pages = sum(lay.num_pages for lay in layouts) + 3
    pool = PagePool(layout, num_pages, dtype=dtype)
    pool.data.fill_(float("nan"))  # a kernel that reads beyond an adapter shows it
    free = list(range(num_pages))
    if is_scattered:
        random.Random(seed).shuffle(free)
    paged, all_weights = [], []
    for ranks, adapter_layout in zip(adapter_ranks, layouts, strict=True):
        weights = make_weights(geometry, ranks, generator)
        pages = [free.pop() for _ in range(adapter_layout.num_pages)]
        packed = pack_adapter(AdapterWeights(weights), adapter_layout, dtype=dtype, rank=rank)
        pool.write(pages, packed)
        all_weights.append(weights)
        paged.append(
            PagedAdapter(
                pages,
                adapter_layout.ranks,
                adapter_layout.a_chunks,
                adapter_layout.b_chunks,
                a_ranks=adapter_layout.a_ranks if num_ranks > 1 else None,
            )
        )
    return LoRACase(pool, all_weights, build_lora_batch(paged, rows, layout.chunk_elems))


class PageWriter:
    """Lays matrices out in an adapter's pages, for what `pack_adapter` does not know yet."""

    def __init__(self, layout: PoolLayout) -> None:
        self._layout = layout
        self._rows: list[torch.Tensor] = []

    def add(self, matrix: torch.Tensor, *, is_packed: bool = False) -> int:
        """Append a matrix or a vector and return its first chunk.

        Every row begins a chunk, or with `is_packed` the matrix follows without gaps. Gaps are NaN.
        """
        chunk_elems = self._layout.chunk_elems
        start = sum(row.numel() for row in self._rows) // chunk_elems
        rows = [matrix.reshape(-1)] if is_packed or matrix.dim() == 1 else list(matrix)
        for row in rows:
            gap = -row.numel() % chunk_elems
            self._rows.append(torch.cat((row.float(), torch.full((gap,), torch.nan))))
        return start

    def write(self, pool: torch.Tensor, free: list[int]) -> list[int]:
        """Write all into pages off `free` of one layer `[P, page_elems]`; return the pages."""
        flat = torch.cat(self._rows)
        num_pages = -(-flat.numel() // self._layout.page_elems)
        gap = num_pages * self._layout.page_elems - flat.numel()
        pages = [free.pop() for _ in range(num_pages)]
        flat = torch.cat((flat, torch.full((gap,), torch.nan)))
        pool[pages] = flat.view(num_pages, -1).to(pool.dtype)
        return pages
