"""What loading adapters does to the requests that run meanwhile: their inter-token times.

A step takes both cores of a small machine, so a load takes its time from somebody: 1 ms of a core
at rank 8 and 5 ms at rank 64 to read, pack and copy an adapter of SmolLM2 (from the disk's cache),
or 0.1 to 1 ms to copy it from host memory. What is measured is how much of that shows in the
inter-token times, of which the slowest count.

A shared machine is now fast, now half as fast, for seconds at a time, which is far more than a load
costs. So phases are short, and every time is relative to the median of the quiet phase next to it;
intervals are of 95 %, by drawing repeats again (bootstrap). A percentile of a few hundred steps is
still wide; what a load adds to the step that it begins in is the sharpest figure here.

N requests decode, each with an adapter of its own. Meanwhile others ask for adapters that are not
there and give up at once, so that loads are all that happens: nobody's prompt is computed. Phases
with and without loads take turns on one engine that reads each adapter from disk and on one that
has all of them in host memory.

    python server/bench/bench_loads.py [--running 8] [--rate 5] [--repeats 30] [--steps 20]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
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
PERCENTS = (50, 95, 99)
NUM_DRAWS = 1000


@dataclass
class Arm:
    """An engine and its inter-token times, seconds, phase by phase."""

    name: str
    core: EngineCore
    cold: cycle[AdapterManifest]
    quiet: list[list[float]] = field(default_factory=list)
    loading: list[list[float]] = field(default_factory=list)
    is_asked: list[list[bool]] = field(default_factory=list)
    """Of each step of the phases with loads: whether one began in it."""
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
            for arm in arms[:: 1 if repeat % 2 else -1]:
                for rate in (0.0, options.rate)[:: 1 if repeat % 4 < 2 else -1]:
                    times, is_asked = run_phase(arm, options.steps, rate)
                    if rate:
                        arm.loading.append(times)
                        arm.is_asked.append(is_asked)
                    else:
                        arm.quiet.append(times)
            print(f"  repeat {repeat + 1} of {options.repeats}")
        for arm in arms:
            arm.core.close()
    report(arms, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=8, help="requests that decode")
    parser.add_argument("--rate", type=float, default=5.0, help="loads per second")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--steps", type=int, default=20, help="of one phase")
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


def run_phase(arm: Arm, num_steps: int, rate: float) -> tuple[list[float], list[bool]]:
    """Run steps and return the time each took, which is every request's inter-token time.

    And of each, whether a load began in it.
    """
    core, times, is_asked = arm.core, list[float](), list[bool]()
    before = core.stats()
    started = last = time.perf_counter()
    num_asked = 0
    for _ in range(num_steps):
        if num_asked < (last - started) * rate:
            ask(arm)  # one step, too
            num_asked += 1
            num_tokens = 1
            is_asked.append(True)
        else:
            is_asked.append(False)
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
    return times, is_asked


def reset(arms: list[Arm]) -> None:
    for arm in arms:
        arm.num_loads, arm.load_s, arm.phase_s = 0, 0.0, 0.0


def relative(arm: Arm) -> tuple[list[list[float]], list[list[float]]]:
    """Return the times of quiet phases and of those with loads, each as a multiple of its scale."""
    scales = [statistics.median(phase) for phase in arm.quiet]
    quiet, loading = (
        [[time_s / scale for time_s in phase] for phase, scale in zip(phases, scales, strict=True)]
        for phases in (arm.quiet, arm.loading)
    )
    return quiet, loading


def ratio_of(
    quiet: list[list[float]], loading: list[list[float]], percent: int
) -> tuple[float, float, float]:
    """Return the ratio of a percentile with loads to that without, and its interval of 95 %."""

    def ratio(repeats: Sequence[int]) -> float:
        with_loads = percentile([x for i in repeats for x in loading[i]], percent)
        return with_loads / percentile([x for i in repeats for x in quiet[i]], percent)

    rng, everything = random.Random(0), range(len(quiet))
    drawn = [ratio(rng.choices(everything, k=len(quiet))) for _ in range(NUM_DRAWS)]
    return ratio(everything), percentile(drawn, 2.5), percentile(drawn, 97.5)


def added_by_load_ms(arm: Arm) -> float:
    """Return by how much longer than the quiet phase's median a step is in which a load begins."""
    return 1e3 * statistics.median(
        time_s - statistics.median(quiet)
        for quiet, times, is_asked in zip(arm.quiet, arm.loading, arm.is_asked, strict=True)
        for time_s, asked in zip(times, is_asked, strict=True)
        if asked
    )


def report(arms: list[Arm], options: argparse.Namespace) -> None:
    """Print ratios, times and one JSON line; a percentile is over all phases of a kind."""
    rows = []
    for arm in arms:
        row: dict[str, object] = {"from": arm.name}
        quiet, loading = relative(arm)
        for percent in PERCENTS:
            row[f"p{percent}_ratio"], *interval = (
                round(x, 3) for x in ratio_of(quiet, loading, percent)
            )
            row[f"p{percent}_interval"] = interval
            for name, phases in (("quiet", arm.quiet), ("loading", arm.loading)):
                times = [time_s for phase in phases for time_s in phase]
                row[f"p{percent}_{name}_ms"] = round(1e3 * percentile(times, percent), 2)
        row["added_by_load_ms"] = round(added_by_load_ms(arm), 2)
        row["loads_per_s"] = round(arm.num_loads / arm.phase_s, 2)
        row["load_ms"] = round(1e3 * arm.load_s / max(1, arm.num_loads), 2)
        rows.append(row)
    print(
        "\n| loads from | p50 ratio | p95 ratio | p99 ratio | added to step | one load | loads/s |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        ratios = " | ".join(
            "{:.3f} ({:.3f} to {:.3f})".format(row[f"p{p}_ratio"], *row[f"p{p}_interval"])  # type: ignore[misc]
            for p in PERCENTS
        )
        print(
            f"| {row['from']} | {ratios} | {row['added_by_load_ms']} ms of {row['p50_quiet_ms']} "
            f"| {row['load_ms']} ms | {row['loads_per_s']} |"
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
