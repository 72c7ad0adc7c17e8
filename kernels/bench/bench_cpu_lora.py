"""What LoRA costs a step on a CPU, against reading its weights once from memory.

    python kernels/bench/bench_cpu_lora.py [--against OTHER/csrc] [--repeats 9] [--threads 2]

SmolLM2-135M in bfloat16, adapters of ranks 32, 64, 8 and 16 in turn on q, k, v and o, at scattered
pages. A step walks all 30 layers as a forward pass does. Decode steps of many adapters are bound by
memory bandwidth: the bytes of their weights over what a plain sum over memory reads. Between steps
300 MB of other memory are read, so that nothing waits in a cache. Steps of many rows per adapter
are bound by arithmetic. Times are the least of all repeats: what a shared machine adds is not ours.

`--against` compiles another folder of C files too (with the same structs), and takes turns with it.
Calls are bare: no Python stands between the sites of a layer but one foreign call.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from loraplex_kernels import native
from loraplex_kernels.batch import LoRABatch, PagedAdapter, build_lora_batch
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_memory.layout import PROJECTIONS, SITES, ModelGeometry, PoolLayout, Site
from loraplex_memory.pool import PagePool

GEOMETRY = ModelGeometry(30, 576, 9, 3, 64, 1536)
RANKS = (32, 64, 8, 16)
QKVO = (1, 1, 1, 1, 0, 0, 0)
USED_SITES: tuple[Site, ...] = ("qkv", "o")
FLUSHED_BYTES = 300 << 20

#: Name, rows of each adapter.
STEPS: dict[str, list[list[int]]] = {
    "32 rows, 32 adapters": [[row] for row in range(32)],
    "32 rows, 8 adapters": [list(range(4 * g, 4 * g + 4)) for g in range(8)],
    "32 rows, 1 adapter": [list(range(32))],
    "1 row, 1 adapter": [[0]],
    "64 rows, 1 adapter": [list(range(64))],
    "128 rows, 2 adapters": [list(range(64)), list(range(64, 128))],
}


@dataclass(frozen=True)
class Arm:
    """One compiled kernel."""

    name: str
    library: ctypes.CDLL


@dataclass(frozen=True)
class Calls:
    """One step: the arguments of every site of every layer, and what they point to."""

    sites: dict[Site, list[native._LoRAArgs]]
    weight_bytes: int
    kept: list[object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="folder of other C files")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    arms = [Arm("now", compile_folder(native._FOLDER))]
    if options.against:
        arms.append(Arm("other", compile_folder(options.against)))
    layout = PoolLayout(GEOMETRY)
    adapters, num_pages = place_adapters(layout, 32)
    pool = make_pool(layout, num_pages)
    flushed = torch.ones(FLUSHED_BYTES // 4)
    records = []
    print(f"{options.threads} threads; a sum reads {read_gb_s(flushed):.1f} GB/s")
    print(f"{'step':<22}{'arm':<7}{'ms':>8}{'qkv ms':>8}{'o ms':>8}{'MB':>8}{'GB/s':>8}")
    for name, rows in STEPS.items():
        batch = build_lora_batch(adapters[: len(rows)], rows, layout.chunk_elems)
        assert batch is not None
        calls = prepare(pool, batch, sum(map(len, rows)))
        for record in measure(arms, calls, flushed, options.repeats):
            records.append({"step": name, **record})
            print(
                f"{name:<22}{record['arm']:<7}{record['ms']:>8.2f}{record['qkv_ms']:>8.2f}"
                f"{record['o_ms']:>8.2f}{record['mb']:>8.1f}{record['gb_s']:>8.1f}"
            )
    print(json.dumps({"threads": options.threads, "steps": records}))


def compile_folder(folder: Path) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as built:
        target = f"{built}/kernels.so"
        sources = map(str, sorted(folder.glob("*.c")))
        subprocess.run(["cc", *native._FLAGS, *sources, "-o", target, "-lm"], check=True)
        return ctypes.CDLL(target)


def place_adapters(layout: PoolLayout, count: int) -> tuple[list[PagedAdapter], int]:
    """Return adapters at scattered pages, and how many pages the pool has."""
    layouts = []
    for g in range(count):
        ranks = tuple(RANKS[g % len(RANKS)] * used for used in QKVO)
        layouts.append(AdapterLayout(layout, AdapterSpec((ranks,) * GEOMETRY.num_layers)))
    num_pages = sum(adapter.num_pages for adapter in layouts)
    free = random.Random(0).sample(range(num_pages), num_pages)
    adapters = []
    for adapter in layouts:
        pages = [free.pop() for _ in range(adapter.num_pages)]
        adapters.append(PagedAdapter(pages, adapter.ranks, adapter.a_chunks, adapter.b_chunks))
    return adapters, num_pages


def make_pool(layout: PoolLayout, num_pages: int) -> torch.Tensor:
    pool = PagePool(layout, num_pages, dtype=torch.bfloat16).data
    pool.copy_(torch.randn(layout.page_elems) / 24)
    return pool


class Recorder:
    """Stands in for the library, to keep the arguments of calls instead of making them."""

    def __init__(self) -> None:
        self.calls: list[native._LoRAArgs] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def record(reference: Any) -> int:
            self.calls.append(reference._obj)
            return 0

        return record


def prepare(pool: torch.Tensor, batch: LoRABatch, num_rows: int) -> Calls:
    sites: dict[Site, list[native._LoRAArgs]] = {}
    kept: list[object] = [batch]
    weight_bytes = 0
    for site in USED_SITES:
        projections = tuple(PROJECTIONS.index(name) for name in SITES[site])
        widths = tuple(GEOMETRY.out_features(name) for name in SITES[site])
        x = torch.randn(num_rows, GEOMETRY.in_features(SITES[site][0])).bfloat16()
        y = torch.zeros(num_rows, sum(widths))
        recorder = Recorder()
        kernels = native.NativeKernels(cast(ctypes.CDLL, recorder))
        for layer in range(GEOMETRY.num_layers):
            kernels.add_lora(
                y, x, pool[layer], batch, layer=layer, projections=projections, out_features=widths
            )
            for p, width in zip(projections, widths, strict=True):
                weight_bytes += 2 * int(batch.ranks[layer, :, p].sum()) * (x.shape[1] + width)
        sites[site] = recorder.calls
        kept += (x, y)
    return Calls(sites, weight_bytes, kept)


def measure(
    arms: list[Arm], calls: Calls, flushed: torch.Tensor, repeats: int
) -> list[dict[str, float | str]]:
    times: dict[str, list[dict[Site, float]]] = {arm.name: [] for arm in arms}
    for _ in range(repeats + 1):
        for arm in arms:
            flushed.sum()
            times[arm.name].append(run_step(arm, calls))
    return [_record(arm.name, times[arm.name][1:], calls.weight_bytes) for arm in arms]


def run_step(arm: Arm, calls: Calls) -> dict[Site, float]:
    """Return the seconds of each site over all layers."""
    run, clock = arm.library.loraplex_add_lora, time.perf_counter
    spent = dict.fromkeys(calls.sites, 0.0)
    for layer in range(GEOMETRY.num_layers):
        for site, args in calls.sites.items():
            reference = ctypes.byref(args[layer])
            start = clock()
            run(reference)
            spent[site] += clock() - start
    return spent


def _record(name: str, steps: list[dict[Site, float]], weight_bytes: int) -> dict[str, float | str]:
    total = min(sum(step.values()) for step in steps)
    sites = {f"{s}_ms": 1e3 * min(step[s] for step in steps) for s in USED_SITES}
    return {
        "arm": name,
        "ms": 1e3 * total,
        **sites,
        "mb": weight_bytes / 1e6,
        "gb_s": weight_bytes / total / 1e9,
    }


def read_gb_s(flushed: torch.Tensor) -> float:
    """Return what a sum reads per second, the best of five."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        flushed.sum()
        best = min(best, time.perf_counter() - start)
    return flushed.numel() * flushed.element_size() / best / 1e9


if __name__ == "__main__":
    main()
