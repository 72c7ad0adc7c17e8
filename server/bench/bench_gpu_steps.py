"""Decode steps through the engine's runner: base, one adapter, and every row its own.

At batch 1 the bytes of the base weights and the launches bound a step, at batch 256 the bytes of
weights, KV and, where all are distinct, adapters. Plans are made before the clock starts, as the
engine makes them while the device computes; each step takes the token of the one before it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from bench_gpu_models import ALL_LINEAR, ATTENTION, uniform_ranks

from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_memory.layout import Projection
from loraplex_memory.pool import PagePool
from loraplex_scheduler.plan import Plan, PlannedAdapter, Request, SequenceStep
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.engine.runner import Flight, StepRunner

_GREEDY = SamplingParams(max_tokens=1 << 20, temperature=0.0, ignore_eos=True)

#: Arms of a comparison: whether each row has an adapter of its own, and on what; None: the base.
ARMS: dict[str, tuple[bool, tuple[Projection, ...]] | None] = {
    "base": None,
    "1 adapter, q k v o": (False, ATTENTION),
    "1 adapter, all linears": (False, ALL_LINEAR),
    "all distinct, q k v o": (True, ATTENTION),
    "all distinct, all linears": (True, ALL_LINEAR),
}


@dataclass(frozen=True)
class StepResult:
    """Milliseconds of one decode step, by arm.

    Attributes:
        share_of_base: base over arm: 1.0 means that LoRA costs nothing.
    """

    case: str
    batch: int
    ms: dict[str, float]

    @property
    def share_of_base(self) -> dict[str, float]:
        return {arm: self.ms["base"] / ms for arm, ms in self.ms.items()}


class StepBench:
    """A runner over a pool of random pages; adapters and KV are whatever lies there."""

    def __init__(self, name: str, runner: StepRunner, pool: PagePool, *, rank: int = 16) -> None:
        self._name = name
        self._runner = runner
        self._pool = pool
        self._rank = rank
        pool.data.normal_(0, 1e-2)

    def fits(self, batch: int, context: int, num_steps: int) -> bool:
        """Whether the pool holds the KV and the adapters of a comparison."""
        return self._num_pages(batch, context, num_steps) <= self._pool.num_pages

    def compare(
        self, batch: int, *, context: int, num_steps: int = 16, rounds: int = 5
    ) -> StepResult:
        """Time all arms in turn, `num_steps` steps at a time."""
        free = torch.randperm(self._pool.num_pages).tolist()
        per_sequence = self._pool.layout.pages_for_tokens(context + num_steps)
        tables = [tuple(free.pop() for _ in range(per_sequence)) for _ in range(batch)]
        plans = {
            # Each arm takes its adapters from the same free pages: what lies there is random.
            arm: self._plans(tables, self._place(adapters, batch, list(free)), context, num_steps)
            for arm, adapters in ARMS.items()
        }
        times: dict[str, list[float]] = {arm: [] for arm in plans}
        for _ in range(rounds + 1):
            for arm, steps in plans.items():
                times[arm].append(self._run(steps))
        # The first round compiles what was not compiled yet.
        ms = {arm: statistics.median(values[1:]) for arm, values in times.items()}
        case = f"{self._name} decode, batch {batch}, context {context}, rank {self._rank}"
        return StepResult(case, batch, ms)

    def _num_pages(self, batch: int, context: int, num_steps: int) -> int:
        layouts = [self._layout(targets) for _, targets in filter(None, ARMS.values())]
        adapters = max(layout.num_pages for layout in layouts)
        return batch * (self._pool.layout.pages_for_tokens(context + num_steps) + adapters)

    def _layout(self, targets: tuple[Projection, ...]) -> AdapterLayout:
        layout = self._pool.layout
        return AdapterLayout(
            layout, AdapterSpec(uniform_ranks(layout.geometry, self._rank, targets))
        )

    def _place(
        self,
        adapters: tuple[bool, tuple[Projection, ...]] | None,
        batch: int,
        free: list[int],
    ) -> list[PlannedAdapter]:
        """Return the adapter of each row, none for the base."""
        if adapters is None:
            return []
        is_distinct, targets = adapters
        layout = self._layout(targets)
        planned = [
            PlannedAdapter(layout, tuple(free.pop() for _ in range(layout.num_pages)))
            for _ in range(batch if is_distinct else 1)
        ]
        return planned if is_distinct else planned * batch

    def _plans(
        self,
        tables: Sequence[tuple[int, ...]],
        planned: Sequence[PlannedAdapter],
        context: int,
        num_steps: int,
    ) -> list[Plan]:
        ids = {id(adapter): f"adapter-{i}" for i, adapter in enumerate(planned)}
        names = [ids[id(adapter)] for adapter in planned] or [None] * len(tables)
        by_name = {name: a for name, a in zip(names, planned, strict=False) if name is not None}
        return [
            Plan(
                tuple(
                    _step(f"request-{s}", name, table, context + k, is_first=k == 0)
                    for s, (table, name) in enumerate(zip(tables, names, strict=True))
                ),
                (),
                by_name,
            )
            for k in range(num_steps)
        ]

    def _run(self, plans: Sequence[Plan]) -> float:
        """Launch each step before waiting for the one before it; milliseconds per step."""
        before: Flight | None = None
        started = time.perf_counter()
        for plan in plans:
            flight = self._runner.launch(plan)
            if before is not None:
                before.result()
            before = flight
        if before is not None:
            before.result()
        return 1e3 * (time.perf_counter() - started) / len(plans)


def _step(
    request_id: str, adapter_id: str | None, table: tuple[int, ...], start: int, *, is_first: bool
) -> SequenceStep:
    manifest = AdapterManifest(adapter_id, "", AdapterSpec(())) if adapter_id else None
    return SequenceStep(
        request=Request(request_id, (5,), _GREEDY, manifest),
        start=start,
        num_tokens=1,
        token_ids=(5,) if is_first else (),
        block_table=table,
        is_sampled=True,
        awaits_token=not is_first,
    )
