"""Thousands of adapters on a CPU: no cliff when more are used than fit.

The default model, the engine in this process, and a pool that holds about 50 adapters beside the
KV cache of what runs. What bounds it: with 2,000 adapters about half of the requests of a Zipf mix
find theirs evicted, and its load (some 7 MB) competes with the steps for memory and for two cores;
a batch has more distinct adapters, too, whose weights are read once each per step.

    throughput   closed loop, 32 in flight: 32 adapters (all resident) against all of them, Zipf and
                 uniform; arms take turns, medians over the repeats
    latency      open loop at 60 % of the first arm's rate: a working set that fits against one
                 twice as large, uniform
    identity     every answer of the first repeat against the same request alone, on an engine
                 without a prefix cache: kernels give the same bits in any company

Generating and registering 2,000 adapters takes some minutes and 14 GB; `--data-dir` keeps them.

    python server/bench/bench_many_adapters.py [--adapters 2000] [--repeats 3] [--data-dir DIR]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from engine_load import Run, closed_loop, open_loop, requests_of
from synthetic_adapters import write_adapter
from workload import TOKEN_IDS, Work, summarize

from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.layout import PoolLayout
from loraplex_scheduler.plan import Request
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.errors import AdapterNotFound
from loraplex_server.adapters.folder_reader import FolderReader
from loraplex_server.adapters.registration import Registration
from loraplex_server.build import ModelFacts, build_core, resolve_facts
from loraplex_server.config import Config
from loraplex_server.engine.core import EngineCore

RANKS = (8, 16, 32, 64)
CONCURRENCY = 32
#: Pages of the pool in units of the mean adapter: about 50 beside the KV cache of 32 sequences.
NUM_FITTING = 50
MEAN_RANK = sum(RANKS) / len(RANKS)
#: KV pages of one sequence of this workload, at most.
PAGES_PER_SEQUENCE = 12


@dataclass(frozen=True)
class Popularity:
    """Who is asked for: `num_adapters` with weights `(i + 1) ** -exponent`; 0 is uniform."""

    name: str
    num_adapters: int
    exponent: float


def main() -> None:
    options = parse_options()
    with ExitStack() as stack:
        folder = options.data_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        facts = resolve_facts(Config())
        config = configure(folder, facts.layout)
        manifests = register(folder, facts, options.adapters, stack)
        core = build_core(config, facts)
        lonely = build_core(replace(config, prefix_cache=False), facts)
        for engine in (core, lonely):
            stack.callback(engine.close)
        warm_up(core, manifests)
        figures = throughput(core, lonely, manifests, options)
        figures |= latency(core, manifests, options)
    print("\n" + json.dumps({"benchmark": "bench_many_adapters"} | vars_of(options) | figures))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=160, help="per run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data-dir", type=Path, help="keep the registered adapters here")
    return parser.parse_args()


def vars_of(options: argparse.Namespace) -> dict[str, object]:
    return {"adapters": options.adapters, "requests": options.requests, "repeats": options.repeats}


def configure(folder: Path, layout: PoolLayout) -> Config:
    """Return settings whose pool holds about `NUM_FITTING` adapters and the KV of the batch."""
    geometry = layout.geometry
    row = sum(geometry.in_features(p) + geometry.out_features(p) for p in ("q", "k", "v", "o"))
    mean_pages = MEAN_RANK * row / layout.page_elems
    num_pages = int(NUM_FITTING * mean_pages) + CONCURRENCY * PAGES_PER_SEQUENCE
    elem_bytes = 2
    return Config(
        data_dir=folder,
        dtype="bfloat16",
        pool_bytes=num_pages * layout.page_bytes(elem_bytes),
        max_running=CONCURRENCY,
    )


def register(
    folder: Path, facts: ModelFacts, num_adapters: int, stack: ExitStack
) -> list[AdapterManifest]:
    """Register generated adapters, unless they are there already; hold each for the whole run."""
    layout, base = facts.layout, facts.base_name
    reader = FolderReader(BaseModel.open(facts.source, facts.spec), (base,))
    catalog = AdapterCatalog(data_dir=folder, pool_layout=layout, base_name=base, reader=reader)
    stack.callback(catalog.close)
    staging = folder / "generated"
    manifests, started = [], time.monotonic()
    for i in range(num_adapters):
        name = f"adapter-{i:05d}"
        try:
            lease = catalog.acquire(name)
        except AdapterNotFound:
            rank = RANKS[i % len(RANKS)]
            write_adapter(staging, layout.geometry, rank=rank, seed=i, base_name=base)
            catalog.register(Registration(name), staging)
            shutil.rmtree(staging)
            lease = catalog.acquire(name)
        stack.callback(lease.release)
        manifests.append(lease.manifest)
    print(f"{num_adapters} adapters registered in {time.monotonic() - started:.0f} s")
    return manifests


def make_work(popularity: Popularity, num_requests: int, seed: int) -> list[Work]:
    """Draw prompts of 16 to 64 tokens and answers of 16 to 64, the same ones for every arm."""
    lengths, adapters = random.Random(seed), random.Random(seed + 1)
    weights = [(i + 1) ** -popularity.exponent for i in range(popularity.num_adapters)]
    cumulative = list(accumulate(weights))
    # Rank must not follow popularity: the adapters are shuffled once.
    order = random.Random(0).sample(range(popularity.num_adapters), popularity.num_adapters)
    return [
        Work(
            order[adapters.choices(range(len(order)), cum_weights=cumulative)[0]],
            tuple(lengths.choices(TOKEN_IDS, k=lengths.randint(16, 64))),
            lengths.randint(16, 64),
        )
        for _ in range(num_requests)
    ]


def warm_up(core: EngineCore, manifests: Sequence[AdapterManifest]) -> None:
    """Touch the weights, and let the step-time model see steps."""
    work = make_work(Popularity("", min(32, len(manifests)), 0.0), 48, seed=99)
    closed_loop(core, requests_of(work, manifests), CONCURRENCY)


def throughput(
    core: EngineCore,
    lonely: EngineCore,
    manifests: Sequence[AdapterManifest],
    options: argparse.Namespace,
) -> dict[str, object]:
    arms = (
        Popularity("32 adapters, Zipf 1.0", 32, 1.0),
        Popularity(f"{options.adapters} adapters, Zipf 1.0", options.adapters, 1.0),
        Popularity(f"{options.adapters} adapters, uniform", options.adapters, 0.0),
    )
    rates: dict[str, list[float]] = {arm.name: [] for arm in arms}
    rows: dict[str, dict[str, float]] = {}
    num_different = num_compared = 0
    for repeat in range(options.repeats):
        for arm in arms:
            requests = requests_of(make_work(arm, options.requests, seed=repeat), manifests)
            before = core.stats()
            run = closed_loop(core, requests, CONCURRENCY)
            after = core.stats()
            rates[arm.name].append(run.tokens_per_s)
            rows[arm.name] = summarize(run.timings, run.wall_s) | {
                "loads": after.num_loads - before.num_loads,
                "evictions": after.num_evictions - before.num_evictions,
                "distinct": len({r.adapter for r in requests}),
            }
            if repeat == 0:
                num_compared += len(requests)
                num_different += count_different(lonely, requests, run)
    medians = {name: statistics.median(r) for name, r in rates.items()}
    first = medians[arms[0].name]
    print(
        f"\nidentity: {num_different} of {num_compared} answers differ from the same request alone"
    )
    print(f"\n| {'throughput':28} | tok/s | ratio | distinct | loads | evictions |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, rate in medians.items():
        row = rows[name]
        print(
            f"| {name:28} | {rate:.0f} | {rate / first:.2f} | {row['distinct']:.0f} "
            f"| {row['loads']:.0f} | {row['evictions']:.0f} |"
        )
    return {"rates": medians, "num_different": num_different, "num_compared": num_compared}


def count_different(lonely: EngineCore, requests: Sequence[Request], run: Run) -> int:
    """Run each request alone and count those whose tokens differ from the run's."""
    num_different = 0
    for request, answer in zip(requests, run.answers, strict=True):
        alone = closed_loop(lonely, [request], 1)
        num_different += alone.answers[0].token_ids != answer.token_ids
    return num_different


def latency(
    core: EngineCore, manifests: Sequence[AdapterManifest], options: argparse.Namespace
) -> dict[str, object]:
    fitting = min(NUM_FITTING // 2, len(manifests))
    arms = (
        Popularity(f"{fitting} adapters, all resident", fitting, 0.0),
        Popularity(f"{2 * NUM_FITTING} adapters, twice what fits", 2 * NUM_FITTING, 0.0),
    )
    # The load is a share of what the first arm can do at most.
    work = make_work(arms[0], options.requests, seed=50)
    run = closed_loop(core, requests_of(work, manifests), CONCURRENCY)
    rate = 0.6 * len(work) / run.wall_s
    rows: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in arms}
    for repeat in range(options.repeats):
        for arm in arms:
            requests = requests_of(make_work(arm, options.requests, 100 + repeat), manifests)
            gaps = random.Random(repeat)
            due_s = list(accumulate(gaps.expovariate(rate) for _ in requests))
            closed_loop(core, requests[:CONCURRENCY], CONCURRENCY)  # this arm's adapters come in
            run = open_loop(core, requests, due_s)
            rows[arm.name].append(summarize(run.timings, run.wall_s))
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in rows.items()
    }
    first = medians[arms[0].name]["ttft_p50_ms"]
    print(f"\n| latency at {rate:.2f} requests/s | TTFT p50 | ratio | TTFT p99 | inter-token p99 |")
    print("|---|--:|--:|--:|--:|")
    for name, row in medians.items():
        print(
            f"| {name} | {row['ttft_p50_ms']:.0f} ms | {row['ttft_p50_ms'] / first:.2f} "
            f"| {row['ttft_p99_ms']:.0f} ms | {row['itl_p99_ms']:.0f} ms |"
        )
    return {"latency": medians, "requests_per_s": rate}


if __name__ == "__main__":
    main()
