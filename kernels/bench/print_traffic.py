"""How many bytes the LoRA launches of one layer move, by their own indexing: no device needed.

    python kernels/bench/print_traffic.py [--launches]

A step of 64 rows, bfloat16. "Distinct" gives each row an adapter of its own, "4 adapters" sixteen
rows each. `padding` is what is read beyond the true ranks; the other columns are the weight bytes
that two other designs read for the same step, as multiples: slots padded to the largest rank
(vLLM, SGLang), and one program per token (S-LoRA's BGMV). `--launches` shows each launch, too.
"""

from __future__ import annotations

import argparse
import json

from loraplex_kernels.batch import LoRABatch, PagedAdapter, build_lora_batch
from loraplex_kernels.lora_shape import LoRAShape
from loraplex_kernels.lora_traffic import launch_traffic, rival_weight_bytes, traffic_table
from loraplex_kernels.lora_work import build_lora_work
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_memory.layout import SITES, ModelGeometry, PoolLayout
from loraplex_server.model.transformer import lora_site

MODELS = {
    "Llama-3-8B": ModelGeometry(1, 4096, 32, 8, 128, 14336),
    "Qwen3-8B": ModelGeometry(1, 4096, 32, 8, 128, 12288),
    "Llama-2-7B": ModelGeometry(1, 4096, 32, 32, 128, 11008),
    "SmolLM2-135M": ModelGeometry(1, 576, 9, 3, 64, 1536),
}
QKVO, ALL_LINEAR = (1, 1, 1, 1, 0, 0, 0), (1,) * 7

#: S-LoRA's settings S1 and S2 (arXiv 2311.03285, table 1), then harder ones.
MIXES = {
    "S1: 8, q k v o": ([8], QKVO),
    "S2: 64 32 16 8, q k v o": ([64, 32, 16, 8], QKVO),
    "16, all linears": ([16], ALL_LINEAR),
    "1 7 200 33 512 24, all linears": ([1, 7, 200, 33, 512, 24], ALL_LINEAR),
}
ROWS = {
    "distinct": [[row] for row in range(64)],
    "4 adapters": [list(range(16 * g, 16 * g + 16)) for g in range(4)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launches", action="store_true")
    args = parser.parse_args()
    print(
        f"{'model':<13}{'ranks':<31}{'64 rows':<12}{'true MB':>8}{'padding':>9}"
        f"{'padded slots':>14}{'per token':>11}"
    )
    records = []
    for model, geometry in MODELS.items():
        for mix, (ranks, modules) in MIXES.items():
            for sharing, rows in ROWS.items():
                record = measure(geometry, ranks, modules, rows, args.launches)
                records.append({"model": model, "ranks": mix, "rows": sharing, **record})
                print(
                    f"{model:<13}{mix:<31}{sharing:<12}{record['true_mb']:>8.2f}"
                    f"{record['padding']:>9.2%}{record['padded_slots']:>13.2f}x"
                    f"{record['per_token']:>10.2f}x"
                )
    print(json.dumps(records))


def measure(
    geometry: ModelGeometry,
    ranks: list[int],
    modules: tuple[int, ...],
    rows: list[list[int]],
    shows_launches: bool,
) -> dict[str, float]:
    """Return megabytes and ratios of one layer's step."""
    layout = PoolLayout(geometry)
    adapters = [[ranks[g % len(ranks)] * used for used in modules] for g in range(len(rows))]
    batch, shapes = make_batch(layout, adapters, rows), site_shapes(layout)
    work = build_lora_work(batch, shapes)
    launches = launch_traffic(batch, work, shapes, layer=0, elem_bytes=2)
    if shows_launches:
        print(traffic_table(launches))
    rivals = rival_weight_bytes(batch, shapes, layer=0, elem_bytes=2, slot_rank=max(ranks))
    true_bytes = rivals["true ranks"]
    return {
        "true_mb": true_bytes / 1e6,
        "padding": sum(traffic.weights for traffic in launches.values()) / true_bytes - 1,
        "padded_slots": rivals["padded slots"] / true_bytes,
        "per_token": rivals["per token"] / true_bytes,
    }


def make_batch(layout: PoolLayout, adapters: list[list[int]], rows: list[list[int]]) -> LoRABatch:
    """Return the batch of adapters with these ranks per projection, at made-up pages."""
    paged, first_page = [], 0
    for ranks in adapters:
        adapter = AdapterLayout(layout, AdapterSpec((tuple(ranks),) * layout.geometry.num_layers))
        pages = list(range(first_page, first_page + adapter.num_pages))
        first_page += adapter.num_pages
        paged.append(PagedAdapter(pages, adapter.ranks, adapter.a_chunks, adapter.b_chunks))
    batch = build_lora_batch(paged, rows, layout.chunk_elems)
    assert batch is not None
    return batch


def site_shapes(layout: PoolLayout) -> list[LoRAShape]:
    """Return the four sites of a layer."""
    return [
        LoRAShape.of(
            lora_site(site, layout.partition),
            chunk_elems=layout.chunk_elems,
            page_elems=layout.page_elems,
        )
        for site in SITES
    ]


if __name__ == "__main__":
    main()
