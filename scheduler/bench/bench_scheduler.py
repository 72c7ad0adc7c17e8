"""What deciding costs: processor time of one step with 256 running sequences and 2,000 adapters.

Bound: the Python interpreter on one core; no tensor is touched. A step is `add` for who arrived,
`expire`, `drop_hopeless`, `schedule`, `advance` and `commit`, as the engine calls them, at the
shape of an 8B model. Sequences end and arrive all the time, so loads, evictions, admissions and
prefix publications are part of what is measured. Times are the thread's processor time, which the
system counts in nanoseconds: what others run meanwhile is not in it, but what they take of caches
and clock frequency is, so compare runs of a quiet machine.

    resident   all 2,000 adapters fit into the pool
    waiting    the pool holds some 300 of them, and another 1,744 requests wait
    decoding   nothing arrives or ends: the floor

Usage: python scheduler/bench/bench_scheduler.py [--steps N]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from loraplex_memory.accounts import PoolAccounts
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_memory.layout import ModelGeometry, PoolLayout
from loraplex_scheduler.collector import CycleCollector
from loraplex_scheduler.limits import SchedulerLimits
from loraplex_scheduler.plan import Plan, Request, SampledToken, StepResult
from loraplex_scheduler.policies import PolicyChoice, make_eviction, make_policies
from loraplex_scheduler.sampling import SamplingParams
from loraplex_scheduler.scheduler import Scheduler

LLAMA_3_8B = ModelGeometry(
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
)
NUM_RUNNING = 256
NUM_ADAPTERS = 2000
RANKS = (8, 16, 32, 64)


@dataclass(frozen=True)
class Arm:
    """One situation: how large the pool is, how many wait, and how long answers are."""

    name: str
    num_pages: int
    num_waiting: int
    answer_len: tuple[int, int]


ARMS = (
    Arm("decoding", 400_000, 0, (100_000, 100_000)),
    Arm("resident", 400_000, 0, (64, 448)),
    Arm("waiting", 30_000, NUM_ADAPTERS - NUM_RUNNING, (64, 448)),
)


class Load:
    """Keeps one scheduler busy: as many requests arrive as end, each of a random adapter."""

    def __init__(self, arm: Arm, choice: PolicyChoice, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self._arm = arm
        layout = PoolLayout(LLAMA_3_8B)
        limits = SchedulerLimits(
            max_step_tokens=2048, max_running=NUM_RUNNING, max_model_len=100_000
        )
        policies = make_policies(choice, limits, layout.page_tokens)
        accounts = PoolAccounts(
            layout,
            arm.num_pages,
            eviction=make_eviction(choice),
            costs=policies.times,
            has_prefix_cache=choice.has_prefix_cache,
        )
        self.scheduler = Scheduler(limits, accounts, policies)
        self._adapters = [_manifest(i) for i in range(NUM_ADAPTERS)]
        self._num_arrived = 0
        self._now = 0.0
        self._adding_s = 0.0
        for _ in range(NUM_RUNNING + arm.num_waiting):
            self._arrive()

    def warm_up(self, num_steps: int = 600) -> None:
        """Reach the steady state: everybody who can run runs, and has run for a while."""
        for i in range(num_steps):
            if not self._arm.num_waiting:  # a few hints per step are taken at once
                for adapter in self._adapters[4 * i : 4 * i + 4]:
                    self.scheduler.prefetch(adapter)
            self.step()

    def step(self) -> float:
        """Run one step; return its seconds of processor time."""
        self._now += 0.02
        started = time.thread_time()
        self.scheduler.expire(self._now)
        self.scheduler.drop_hopeless(self._now)
        plan = self.scheduler.schedule(self._now)
        deciding = time.thread_time() - started + self._adding_s
        self._adding_s = 0.0
        result = _result(plan)
        started = time.thread_time()
        self.scheduler.advance(plan)
        events = self.scheduler.commit(plan, result, 0.02)
        deciding += time.thread_time() - started
        for load in plan.loads:
            self.scheduler.finish_load(load.adapter.adapter_id, 0.002)
        for event in events:
            if event.finish_reason is not None:
                self._arrive()
        return deciding

    def _arrive(self) -> None:
        self._num_arrived += 1
        prompt_len = self._rng.randint(8, 511)
        request = Request(
            request_id=f"r{self._num_arrived}",
            prompt_token_ids=tuple(self._rng.choices(range(32000), k=prompt_len)),
            sampling=SamplingParams(max_tokens=self._rng.randint(*self._arm.answer_len)),
            adapter=self._rng.choice(self._adapters),
            arrival_s=self._now,
            deadline_s=self._now + 600.0,
            tenant=f"t{self._num_arrived % 50}",
        )
        started = time.thread_time()
        self.scheduler.add(request)
        self._adding_s += time.thread_time() - started


def _manifest(index: int) -> AdapterManifest:
    rank = RANKS[index % len(RANKS)]
    layer = (rank, rank, rank, rank, 0, 0, 0)
    spec = AdapterSpec((layer,) * LLAMA_3_8B.num_layers)
    return AdapterManifest(f"sha256:{index:064x}", "", spec)


def _result(plan: Plan) -> StepResult:
    token = SampledToken(7)
    return StepResult({step.request_id: token for step in plan.sequences if step.is_sampled})


def measure(arm: Arm, choice: PolicyChoice, num_steps: int) -> dict[str, float]:
    """Return milliseconds per step, and what was running meanwhile."""
    load = Load(arm, choice)
    load.warm_up()
    CycleCollector(
        time.monotonic()
    )  # as in the engine process; nothing falls due in so short a time
    took = sorted(1e3 * load.step() for _ in range(num_steps))
    return {
        "p50_ms": statistics.median(took),
        "p99_ms": took[int(0.99 * len(took))],
        "max_ms": took[-1],
        "running": load.scheduler.num_running,
        "waiting": load.scheduler.num_waiting,
        "resident": len(load.scheduler.accounts.residency),
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args(argv)
    rows: dict[str, dict[str, float]] = {}
    write: Callable[[str], None] = print
    columns = ("p50 ms", "p99 ms", "max ms", "running", "waiting", "resident")
    write(f"{'':10} " + " ".join(f"{column:>8}" for column in columns))
    for arm in ARMS:
        row = rows[arm.name] = measure(arm, PolicyChoice(), options.steps)
        write(
            f"{arm.name:10} {row['p50_ms']:8.3f} {row['p99_ms']:8.3f} {row['max_ms']:8.3f} "
            f"{row['running']:8} {row['waiting']:8} {row['resident']:8}"
        )
    write(json.dumps({"bench": "scheduler", "steps": options.steps, "rows": rows}))


if __name__ == "__main__":
    main(sys.argv[1:])
