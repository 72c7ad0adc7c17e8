"""What loading adapters does to the requests that run meanwhile: their inter-token times.

A step takes both cores of a small machine, so a load takes its time from somebody: 2 ms of a core
at rank 8 and 8 ms at rank 64 to read, pack and copy an adapter of SmolLM2 (from the disk's cache),
or 0.1 to 0.9 ms to copy it from host memory. What is measured is how much of that shows in the
inter-token times, of which the slowest count.

N requests decode, each with an adapter of its own. Meanwhile others ask for adapters that are not
there and give up at once, so that loads are all that happens: nobody's prompt is computed. Phases
with and without loads take turns on one engine that reads each adapter from disk and on one that
has all of them in host memory.

    python server/bench/bench_loads.py [--running 16] [--rate 5] [--repeats 8] [--steps 60]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import cycle
from pathlib import Path

import torch
from bench_gpu_models import write_adapters
from workload import TOKEN_IDS, percentile

from loraplex_kernels.native import load_native
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.host_arena import HostArena
from loraplex_memory.layout import PoolLayout
from loraplex_memory.pool import PagePool
from loraplex_scheduler.limits import SchedulerLimits
from loraplex_scheduler.plan import Request, TokenEvent
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.build import assemble_core
from loraplex_server.engine.core import EngineCore
from loraplex_server.model.loader import load_model
from loraplex_server.model.source import resolve_model
from loraplex_server.model.transformer import Transformer

RANKS = (8, 16, 32, 64)
#: Adapters that are loaded again and again; distinct files, 180 MB of pages in bfloat16.
NUM_COLD = 32
PROMPT_TOKENS = 64


@dataclass
class Arm:
    """An engine and its inter-token times, seconds, phase by phase."""

    name: str
    core: EngineCore
    cold: cycle[AdapterManifest]
    quiet: list[list[float]] = field(default_factory=list)
    loading: list[list[float]] = field(default_factory=list)
    num_loads: int = 0
    num_asked: int = 0
    phase_s: float = 0.0
    load_s: float = 0.0


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    if options.switch_interval_ms is not None:
        sys.setswitchinterval(options.switch_interval_ms / 1e3)
    load_native()
    model = load_model(resolve_model(None), dtype=getattr(torch, options.dtype))
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as name:
        geometry = model.spec.geometry
        warm = write_adapters(Path(name), geometry, RANKS, options.running, "warm")
        cold = write_adapters(Path(name), geometry, RANKS, NUM_COLD, "cold")
        arms = [
            make_arm("disk", model, warm, cold, options),
            make_arm("host memory", model, warm, cold, options),
        ]
        for arm in arms:  # untimed
            run_phase(arm, options.steps, 0.0)
            run_phase(arm, options.steps, options.rate)
        reset(arms)
        for repeat in range(options.repeats):
            for arm in arms:
                arm.quiet.append(run_phase(arm, options.steps, 0.0))
                arm.loading.append(run_phase(arm, options.steps, options.rate))
            print(f"  repeat {repeat + 1} of {options.repeats}")
        for arm in arms:
            arm.core.close()
    report(arms, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=16, help="requests that decode")
    parser.add_argument("--rate", type=float, default=5.0, help="loads per second")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60, help="of one phase")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--switch-interval-ms", type=float, help="default: Python's, 5 ms")
    return parser.parse_args()


def make_arm(
    name: str,
    model: Transformer,
    warm: list[AdapterManifest],
    cold: list[AdapterManifest],
    options: argparse.Namespace,
) -> Arm:
    """Return an engine whose requests decode; its host memory, if any, holds all adapters."""
    # Twice what is timed: loads that a phase began end after it.
    num_tokens = PROMPT_TOKENS + 4 * (options.repeats + 1) * options.steps
    limits = SchedulerLimits(
        max_step_tokens=max(512, options.running),
        max_running=options.running,
        max_model_len=num_tokens,
    )
    layout = PoolLayout(model.spec.geometry)
    num_pages = options.running * (layout.pages_for_tokens(num_tokens) + 40) + 200
    pool = PagePool(layout, num_pages, dtype=model.dtype)
    arena = None
    if name == "host memory":
        arena = HostArena(layout, 40 * (len(warm) + len(cold)), dtype=model.dtype)
    arm = Arm(name, assemble_core(model, pool, limits, arena=arena), cycle(cold))
    for _ in cold:  # while nothing runs, so that this takes no tokens
        ask(arm)
        while arm.core.stats().loading:
            arm.core.step(load_timeout_s=1.0)
    prompt = tuple(TOKEN_IDS[:PROMPT_TOKENS])
    sampling = SamplingParams(
        max_tokens=num_tokens - PROMPT_TOKENS, temperature=0.0, ignore_eos=True
    )
    for i, adapter in enumerate(warm):
        arm.core.add(Request(f"run-{i}", (i, *prompt[1:]), sampling, adapter))
    while arm.core.scheduler.num_running < len(warm):
        arm.core.step(load_timeout_s=1.0)
    assert arena is None or len(arm.core.stats().host_adapters) == len(warm) + len(cold)
    return arm


def ask(arm: Arm) -> None:
    """Have the engine load the next adapter, and nobody wait for it."""
    adapter = next(arm.cold)
    arm.core.scheduler.discard_adapter(adapter.adapter_id)
    request_id = f"ask-{arm.num_asked}"
    arm.num_asked += 1
    arm.core.add(Request(request_id, (1, 2), SamplingParams(max_tokens=1), adapter))
    arm.core.step()
    arm.core.abort(request_id)
    assert adapter.adapter_id in arm.core.stats().loading, "nothing was loaded"


def run_phase(arm: Arm, num_steps: int, rate: float) -> list[float]:
    """Run steps and return the time each took, which is every request's inter-token time."""
    core, times = arm.core, list[float]()
    before = core.stats()
    started = last = time.perf_counter()
    num_asked = 0
    for _ in range(num_steps):
        if num_asked < (last - started) * rate:
            ask(arm)  # one step, too
            num_asked += 1
            num_tokens = 1
        else:
            num_tokens = sum(isinstance(event, TokenEvent) for event in core.step())
        assert num_tokens, "nothing ran"
        now = time.perf_counter()
        times.append(now - last)
        last = now
    while core.stats().loading:  # not part of the phase after
        core.step()
    if rate:
        after = core.stats()
        arm.num_loads += after.num_loads - before.num_loads
        arm.load_s += after.load_s - before.load_s
        arm.phase_s += last - started
    return times


def reset(arms: list[Arm]) -> None:
    for arm in arms:
        arm.num_loads, arm.load_s, arm.phase_s = 0, 0.0, 0.0


def report(arms: list[Arm], options: argparse.Namespace) -> None:
    """Print ratios, times and one JSON line; a percentile is over all phases of a kind."""
    rows = []
    for arm in arms:
        row: dict[str, object] = {"from": arm.name}
        for percent in (50, 99):
            quiet, loading = (
                1e3 * percentile([time_s for phase in phases for time_s in phase], percent)
                for phases in (arm.quiet, arm.loading)
            )
            row[f"p{percent}_ratio"] = round(loading / quiet, 3)
            row[f"p{percent}_quiet_ms"] = round(quiet, 2)
            row[f"p{percent}_loading_ms"] = round(loading, 2)
        row["p99_ratio_by_repeat"] = round(
            statistics.median(
                percentile(b, 99) / percentile(a, 99)
                for a, b in zip(arm.quiet, arm.loading, strict=True)
            ),
            3,
        )
        row["loads_per_s"] = round(arm.num_loads / arm.phase_s, 2)
        row["load_ms"] = round(1e3 * arm.load_s / max(1, arm.num_loads), 2)
        rows.append(row)
    print("\n| loads from | p50 ratio | p99 ratio | p50 ms | p99 ms | loads/s | one load ms |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        print(
            "| {from} | {p50_ratio:.3f} | {p99_ratio:.3f} | {p50_quiet_ms} -> {p50_loading_ms} "
            "| {p99_quiet_ms} -> {p99_loading_ms} | {loads_per_s} | {load_ms} |".format(**row)
        )
    print("\n" + json.dumps(environment(options) | {"arms": rows}))


def environment(options: argparse.Namespace) -> dict[str, object]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "benchmark": "bench_loads",
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "switch_interval_ms": 1e3 * sys.getswitchinterval(),
        "versions": {name: version(name) for name in ("loraplex", "torch")},
    } | {name: getattr(options, name) for name in ("running", "rate", "repeats", "steps", "dtype")}


if __name__ == "__main__":
    main()
