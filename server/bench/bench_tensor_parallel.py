"""What the ranks of one replica tell each other in a decode step, and what a step takes.

Every rank is a process; they meet over the loopback device, whose byte counter is read beside our
own count. Decode steps of 32 sequences: of the base, and each with an adapter of rank 16 on q, k, v
and o, and on all linears. Beside what is sent stand two other ways to serve adapters on several
devices, by formula, with each rank's share of an adapter:

- replicated: whole adapters on every rank; the inputs of o and down, which are cut, are gathered.
- half cut (other servers' default): A of q, k, v, gate and up and B of o and down on every rank;
  nothing is sent.

    python server/bench/bench_tensor_parallel.py [--model FOLDER] [--steps 20] [--ranks 2 4]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from loraplex_kernels.batch import LoRABatch, PagedAdapter, build_attention_batch, build_lora_batch
from loraplex_kernels.collectives import Collectives, join_group
from loraplex_kernels.ops import backend_of, host_backend
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_memory.layout import PROJECTIONS, ModelGeometry, PoolLayout, Projection
from loraplex_memory.partition import ROW_PARALLEL, Partition
from loraplex_memory.pool import PagePool
from loraplex_server.machine import num_processors
from loraplex_server.model.loader import load_spec, load_weights
from loraplex_server.model.model_shard import ModelShard
from loraplex_server.model.source import resolve_model
from loraplex_server.model.transformer import Transformer

BATCH: Final = 32
RANK: Final = 16
CONTEXT: Final = 128
TARGETS: Final[dict[str, tuple[Projection, ...]]] = {
    "base": (),
    "q, k, v, o": ("q", "k", "v", "o"),
    "all linears": PROJECTIONS,
}
_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True)
class Measured:
    """One rank's medians over the steps of an arm.

    Attributes:
        step_ms: of a step.
        sent: bytes that this rank sent in a step, as it counts them, by kind.
        messages: collectives of a step, by kind.
        wire: bytes that the loopback device carried in a step, of all ranks, headers included.
    """

    step_ms: float
    sent: dict[str, int]
    messages: dict[str, int]
    wire: float


class RankSteps:
    """One rank's decode steps over a pool of random numbers: what they compute means nothing."""

    def __init__(self, model: Transformer, num_ranks: int) -> None:
        self._model = model
        self._layout = PoolLayout(model.spec.geometry, num_ranks=num_ranks)
        per_sequence = self._layout.pages_for_tokens(CONTEXT)
        most = BATCH * (per_sequence + adapter_layout(self._layout, PROJECTIONS).num_pages)
        self._pool = PagePool(self._layout, most, dtype=model.dtype)
        self._pool.data.normal_(std=0.02)
        ids = iter(range(most))
        self._tables = [[next(ids) for _ in range(per_sequence)] for _ in range(BATCH)]
        self._free = list(ids)

    def run(self, targets: tuple[Projection, ...]) -> None:
        attention = build_attention_batch(
            [(CONTEXT - 1, 1)] * BATCH, self._tables, self._layout.page_tokens
        )
        backend = backend_of(self._model.group, host_backend())
        ops = backend.prepare(attention, self._lora(targets))
        self._model.forward(torch.arange(BATCH) + 1000, ops, self._pool, torch.arange(BATCH))

    def _lora(self, targets: tuple[Projection, ...]) -> LoRABatch | None:
        layout = adapter_layout(self._layout, targets)
        if not targets:
            return None
        n = layout.num_pages
        adapters = [
            PagedAdapter(
                self._free[i * n : (i + 1) * n],
                layout.ranks,
                layout.a_chunks,
                layout.b_chunks,
                a_ranks=layout.a_ranks if self._layout.num_ranks > 1 else None,
            )
            for i in range(BATCH)
        ]
        return build_lora_batch(adapters, [[i] for i in range(BATCH)], self._layout.chunk_elems)


def adapter_layout(layout: PoolLayout, targets: tuple[Projection, ...]) -> AdapterLayout:
    row = tuple(RANK if name in targets else 0 for name in PROJECTIONS)
    return AdapterLayout(layout, AdapterSpec((row,) * layout.geometry.num_layers))


def measure(rank: int, num_ranks: int, port: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run all arms on one rank; every rank does the same."""
    torch.set_num_threads(max(1, num_processors() // num_ranks))
    group: Collectives | None = None
    if num_ranks > 1:
        store = dist.TCPStore("127.0.0.1", port, num_ranks, is_master=rank == 0)
        group = join_group(rank, num_ranks, store, torch.device("cpu"), _TIMEOUT_S)
    steps = RankSteps(load_rank(rank, num_ranks, group, options), num_ranks)
    return {name: vars(_measure(steps, group, t, options.steps)) for name, t in TARGETS.items()}


def load_rank(
    rank: int, num_ranks: int, group: Collectives | None, options: argparse.Namespace
) -> Transformer:
    source = resolve_model(options.model)
    spec = load_spec(source)
    shard = ModelShard(Partition(spec.geometry, num_ranks), rank) if num_ranks > 1 else None
    weights = load_weights(source, spec, dtype=getattr(torch, options.dtype), shard=shard)
    return Transformer(spec, weights, group=group)


def _measure(
    steps: RankSteps, group: Collectives | None, targets: tuple[Projection, ...], num_steps: int
) -> Measured:
    steps.run(targets)
    before = _counts(group)
    wire = loopback_bytes()
    times = []
    for _ in range(num_steps):
        started = time.perf_counter()
        steps.run(targets)
        times.append(1e3 * (time.perf_counter() - started))
    wire = loopback_bytes() - wire
    sent, messages = (
        {kind: (after[kind] - then.get(kind, 0)) // num_steps for kind in after}
        for after, then in zip(_counts(group), before, strict=True)
    )
    return Measured(statistics.median(times), sent, messages, wire / num_steps)


def _counts(group: Collectives | None) -> tuple[dict[str, int], dict[str, int]]:
    if group is None:
        return {}, {}
    return {**group.traffic.num_bytes}, {**group.traffic.num_messages}


def loopback_bytes() -> int:
    """Return what the loopback device has carried since the machine started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    return 0


def run_ranks(num_ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return what rank 0 measured; the others run beside it."""
    context = multiprocessing.get_context("spawn")
    port = _free_port()
    results = context.Queue()
    ranks = [
        context.Process(target=_rank_main, args=(rank, num_ranks, port, options, results))
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    found: dict[str, Any] = results.get(timeout=1800)
    for process in ranks:
        process.join()
    return found


def _rank_main(rank: int, num_ranks: int, port: int, options: Any, results: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    found = measure(rank, num_ranks, port, options)
    if rank == 0:
        results.put(found)
    if num_ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def _free_port() -> int:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return int(store.port)


def other_ways(
    geometry: ModelGeometry, num_ranks: int, targets: tuple[Projection, ...], elem_bytes: int
) -> dict[str, tuple[int, float]]:
    """Return what a rank sends for LoRA in a step, and a rank's share of an adapter, by way."""
    g, layers = geometry, geometry.num_layers
    whole = sum(RANK * (g.in_features(p) + g.out_features(p)) for p in targets)
    gathered = sum(g.in_features(p) for p in targets if p in ROW_PARALLEL)
    kept = sum(
        RANK * (g.out_features(p) if p in ROW_PARALLEL else g.in_features(p)) for p in targets
    )
    gather_bytes = layers * BATCH * gathered * (num_ranks - 1) // num_ranks * elem_bytes
    half = (kept + (whole - kept) / num_ranks) / whole
    return {"replicated": (gather_bytes, 1.0), "half cut": (0, half)}


def print_table(
    found: Mapping[int, Mapping[str, Any]], geometry: ModelGeometry, elem_bytes: int
) -> None:
    print("| ranks | adapters | step ms | base | LoRA | embedding | head | messages | wire, all |")
    print("|--:|---|--:|--:|--:|--:|--:|--:|--:|")
    for num_ranks, arms in found.items():
        for name, arm in arms.items():
            kib = [arm["sent"].get(k, 0) / 1024 for k in ("base", "lora", "embedding", "head")]
            cells = [f"{arm['step_ms']:.1f}", *(f"{n:.0f}" for n in kib)]
            cells += [str(sum(arm["messages"].values())), f"{arm['wire'] / 1024:.0f}"]
            print(f"| {num_ranks} | {name} | " + " | ".join(cells) + " |")
    print(
        "\nBytes are KiB that one rank sends in a step; `wire` is the loopback's, of all ranks.\n"
    )
    print("| ranks | adapters | way | LoRA sends, KiB | share of an adapter on a rank |")
    print("|--:|---|---|--:|--:|")
    for num_ranks, arms in found.items():
        for name, targets in TARGETS.items():
            if num_ranks == 1 or not targets:
                continue
            own = adapter_layout(PoolLayout(geometry, num_ranks=num_ranks), targets).num_elems
            share = own / adapter_layout(PoolLayout(geometry), targets).num_elems
            ways = {"S-LoRA's, as served": (arms[name]["sent"]["lora"], share)}
            ways |= other_ways(geometry, num_ranks, targets, elem_bytes)
            for way, (sent, part) in ways.items():
                print(f"| {num_ranks} | {name} | {way} | {sent / 1024:.0f} | {part:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or GGUF file; default: the server's")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--steps", type=int, default=20, help="per arm")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    found = {n: run_ranks(n, options) for n in options.ranks}
    geometry = load_spec(resolve_model(options.model)).geometry
    print_table(found, geometry, getattr(torch, options.dtype).itemsize)
    print("\n" + json.dumps({"benchmark": "bench_tensor_parallel", "ranks": found}))


if __name__ == "__main__":
    main()
