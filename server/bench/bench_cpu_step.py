"""Where a decode step on a CPU spends its time, against what bounds it.

Decode steps of 1, 8 and 32 sequences of one context, of the base and of an adapter each (ranks 8,
16, 32 and 64 in turn on q, k, v and o). The floor of a step is the larger of two times: its bytes
(weights, KV, adapters, each once) over the bandwidth that the machine was measured to have, and its
products over the measured rate of bfloat16 products. Medians over steps; the operations' times are
those of one thread, waiting included, and add up to the step's.

    python server/bench/bench_cpu_step.py [--model FOLDER] [--steps 40] [--context 128]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from loraplex_kernels.batch import (
    LoRABatch,
    PagedAdapter,
    build_attention_batch,
    build_lora_batch,
)
from loraplex_kernels.decoder import Op
from loraplex_kernels.ops import host_backend
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_memory.layout import PROJECTIONS, PoolLayout
from loraplex_memory.pool import PagePool
from loraplex_server.model.loader import load_model
from loraplex_server.model.source import resolve_model
from loraplex_server.model.transformer import Transformer

RANKS = (8, 16, 32, 64)
TARGETS = ("q", "k", "v", "o")
NUM_SEQUENCES = (1, 8, 32)
OPS = [op.name.lower() for op in Op] + ["final_norm", "head"]


@dataclass(frozen=True)
class Arm:
    num_sequences: int
    has_adapters: bool

    @property
    def name(self) -> str:
        return f"{self.num_sequences}, {'distinct adapters' if self.has_adapters else 'base'}"


class Steps:
    """Decode steps over a pool of random numbers: what they compute is of no meaning."""

    def __init__(self, model: Transformer, context: int) -> None:
        self._model = model
        self._layout = PoolLayout(model.spec.geometry)
        self._context = context
        most = max(NUM_SEQUENCES)
        self._adapters = [self._adapter_layout(RANKS[i % len(RANKS)]) for i in range(most)]
        per_sequence = self._layout.pages_for_tokens(context)
        num_pages = most * per_sequence + sum(a.num_pages for a in self._adapters)
        self._pool = PagePool(self._layout, num_pages, dtype=model.dtype)
        self._pool.data.normal_(std=0.02)
        order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0)).tolist()
        self._tables = [[order.pop() for _ in range(per_sequence)] for _ in range(most)]
        self._pages = [[order.pop() for _ in range(a.num_pages)] for a in self._adapters]

    def _adapter_layout(self, rank: int) -> AdapterLayout:
        row = tuple(rank if name in TARGETS else 0 for name in PROJECTIONS)
        ranks = (row,) * self._model.spec.geometry.num_layers
        return AdapterLayout(self._layout, AdapterSpec(ranks))

    def measure(self, arm: Arm, num_steps: int) -> dict[str, float]:
        """Return medians in milliseconds: `step`, and each operation."""
        decoder = self._model.cpu_decoder(self._pool)
        if decoder is None:
            raise SystemExit("no compiled kernels here: install a C compiler")
        runs = []
        for _ in range(num_steps):
            decoder.decoder.op_ns = torch.zeros(len(OPS), dtype=torch.int64)
            started = time.perf_counter()
            self._step(arm)
            step_ms = 1e3 * (time.perf_counter() - started)
            ops_ms = (decoder.decoder.op_ns / 1e6).tolist()
            runs.append({"step": step_ms} | dict(zip(OPS, ops_ms, strict=True)))
        decoder.decoder.op_ns = None
        warm = runs[num_steps // 4 :]
        return {name: statistics.median(run[name] for run in warm) for name in warm[0]}

    def _step(self, arm: Arm) -> None:
        count = arm.num_sequences
        attention = build_attention_batch(
            [(self._context - 1, 1)] * count, self._tables[:count], self._layout.page_tokens
        )
        ops = host_backend().prepare(attention, self._lora(count) if arm.has_adapters else None)
        self._model.forward(torch.arange(count) + 1000, ops, self._pool, torch.arange(count))

    def _lora(self, count: int) -> LoRABatch | None:
        adapters = [
            PagedAdapter(pages, layout.ranks, layout.a_chunks, layout.b_chunks)
            for pages, layout in zip(self._pages[:count], self._adapters, strict=False)
        ]
        return build_lora_batch(adapters, [[i] for i in range(count)], self._layout.chunk_elems)

    def floor_ms(self, arm: Arm, bytes_per_s: float, flops: float) -> tuple[float, float]:
        """Return the times of the step's bytes and of its products."""
        g, size = self._model.spec.geometry, self._model.dtype.itemsize
        weights = (
            sum(g.in_features(name) * g.out_features(name) for name in PROJECTIONS) * g.num_layers
            + g.hidden_size * self._model.spec.vocab_size
        )
        adapters = sum(
            rank * sum(g.in_features(name) + g.out_features(name) for name in TARGETS)
            for rank in (RANKS[i % len(RANKS)] for i in range(arm.num_sequences))
        )
        adapters *= g.num_layers * arm.has_adapters
        kv = arm.num_sequences * self._context * g.kv_elems_per_token * g.num_layers
        bytes_ms = 1e3 * size * (weights + adapters + kv) / bytes_per_s
        return bytes_ms, 1e3 * 2 * (weights * arm.num_sequences + adapters) / flops


def main() -> None:
    options = parse_options()
    rates = machine_rates()
    model = load_model(resolve_model(options.model), dtype=getattr(torch, options.dtype))
    steps = Steps(model, options.context)
    todo = [Arm(n, has) for n in NUM_SEQUENCES for has in (False, True)]
    results = {arm: steps.measure(arm, options.steps) for arm in todo}
    print("| sequences | step ms | floor: bytes / products ms | " + " | ".join(OPS) + " |")
    print("|---|" + "--:|" * (len(OPS) + 2))
    for arm, found in results.items():
        floors = steps.floor_ms(arm, rates["bytes_per_s"], rates["bf16_flops"])
        cells = [f"{found['step']:.2f}", " / ".join(f"{floor:.1f}" for floor in floors)]
        cells += [f"{found[name]:.2f}" for name in OPS]
        print(f"| {arm.name} | " + " | ".join(cells) + " |")
    rows = [{"arm": arm.name} | found for arm, found in results.items()]
    print("\n" + json.dumps({"benchmark": "bench_cpu_step", "rates": rates, "arms": rows}))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or GGUF file; default: the server's")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--steps", type=int, default=40, help="per arm; a quarter is not counted")
    parser.add_argument("--context", type=int, default=128, help="tokens of each sequence")
    return parser.parse_args()


def machine_rates() -> dict[str, float]:
    """Measure the machine in a process of its own, before this one has threads that spin."""
    script = Path(__file__).with_name("machine_rates.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    rates: dict[str, float] = json.loads(done.stdout)
    return rates


if __name__ == "__main__":
    main()
