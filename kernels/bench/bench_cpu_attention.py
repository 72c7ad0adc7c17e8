"""The CPU's attention kernel: time per item and its shares of bandwidth and of arithmetic.

An item is one sequence (or 48 query rows of a prompt) and one KV head. Each call reads another
layer of a pool far larger than the caches, as a decode step does: what bounds a decode is the
memory, what bounds a long prompt is arithmetic. A library of another commit (`--other`, what
`native` keeps in its cache folder) is measured in turns with this one's.

    python kernels/bench/bench_cpu_attention.py [--other OLD.so] [--only decode]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from loraplex_kernels import native
from loraplex_kernels.batch import AttentionBatch, build_attention_batch

PAGE_TOKENS = 16
#: SmolLM2-135M
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
POOL_BYTES = 200 << 20


@dataclass(frozen=True)
class Case:
    name: str
    spans: list[tuple[int, int]]  # per sequence: tokens before, new tokens


CASES = [
    *(Case(f"decode 32 x {n}", [(n - 1, 1)] * 32) for n in (32, 124, 512, 2048)),
    *(Case(f"decode 1 x {n}", [(n - 1, 1)]) for n in (124, 2048, 16384)),
    *(Case(f"prefill {n}", [(0, n)]) for n in (16, 64, 512, 2048)),
    Case("prefill 8 x 64", [(0, 64)] * 8),
]


def make_calls(
    kernels: native.NativeKernels, layers: list[torch.Tensor], batch: AttentionBatch
) -> Callable[[], None]:
    """Return one call per layer of `layers`, each `[P, 2, page_tokens, kv_heads, head_dim]`."""
    query = torch.randn(batch.positions.shape[0], HEADS, HEAD_DIM)

    def run() -> None:
        for kv in layers:
            kernels.paged_attention(query, kv, batch, scale=0.125, window=None)

    return run


def make_case(case: Case, dtype: torch.dtype) -> tuple[list[torch.Tensor], AttentionBatch]:
    pages = [-(-(start + n) // PAGE_TOKENS) for start, n in case.spans]
    ids = list(range(sum(pages)))
    random.Random(0).shuffle(ids)
    tables = [[ids.pop() for _ in range(n)] for n in pages]
    shape = (sum(pages), 2, PAGE_TOKENS, KV_HEADS, HEAD_DIM)
    num_layers = max(2, min(30, POOL_BYTES // (torch.Size(shape).numel() * dtype.itemsize)))
    pool = torch.randn(num_layers, *shape, dtype=dtype)
    return list(pool), build_attention_batch(case.spans, tables, PAGE_TOKENS)


def measure(arms: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Return the median seconds of one run of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for run in arms.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, run in arms.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(samples) for name, samples in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", action="append", default=[], metavar="LIBRARY")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--seconds", type=float, default=3.0, help="per case")
    options = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    kernels = native.load_native()
    assert kernels is not None, "no C compiler"
    libraries = {"this": kernels}
    libraries |= {path: native.NativeKernels(ctypes.CDLL(path)) for path in options.other}
    results = []
    for case in CASES:
        if options.only not in case.name:
            continue
        layers, batch = make_case(case, dtype)
        arms = {name: make_calls(k, layers, batch) for name, k in libraries.items()}
        pairs = sum(n * start + n * (n + 1) // 2 for start, n in case.spans)
        flops = 4 * pairs * HEADS * HEAD_DIM
        num_bytes = sum(start + n for start, n in case.spans) * 2 * KV_HEADS * HEAD_DIM
        num_bytes *= dtype.itemsize
        print(f"{case.name}: {flops / 1e6:.1f} MFLOP, {num_bytes / 1e6:.2f} MB of K and V")
        for name, run_s in measure(arms, options.seconds).items():
            call_s = run_s / len(layers)
            results.append(
                {
                    "case": case.name,
                    "library": name,
                    "us": call_s * 1e6,
                    "gb_per_s": num_bytes / call_s / 1e9,
                    "gflops": flops / call_s / 1e9,
                }
            )
            print(
                f"  {name:30} {call_s * 1e6:9.1f} us  "
                f"{num_bytes / call_s / 1e9:6.1f} GB/s  {flops / call_s / 1e9:6.1f} GFLOPS"
            )
    print(
        json.dumps(
            {
                "bench": "cpu_attention",
                "dtype": options.dtype,
                "threads": torch.get_num_threads(),
                "machine": platform.machine(),
                "torch": torch.__version__,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
