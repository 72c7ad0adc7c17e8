"""The case of both fleet experiments: 100,000 adapters at 1,000 requests per second.

Llama-3-8B on H200s, 2.1 times the roofline (48 % of the device's peak); adapters of ranks 8, 16, 32
and 64 on q, k, v and o in turn by popularity, 5.1 TB in all; Zipf; lognormal lengths with the
medians of Chameleon's mix (255 in, 64 out). No prompt begins like another, so the prefix cache is
off. Fleets start warm (`warmth`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from loraplex_scheduler.policies import PolicyChoice
from loraplex_server.simulator.experiments.options import Options
from loraplex_server.simulator.fleet import Death, Fleet
from loraplex_server.simulator.fleet_figures import FleetFigures, Objective, fleet_figures
from loraplex_server.simulator.hardware import find_hardware
from loraplex_server.simulator.models import find_setting
from loraplex_server.simulator.object_store import StoreSpeed
from loraplex_server.simulator.results import Outcome
from loraplex_server.simulator.routing.names import make_router
from loraplex_server.simulator.routing.popularity import PopularityPlacement
from loraplex_server.simulator.setup import (
    A100_STEP_TOKENS,
    S_LORA_INEFFICIENCY,
    EngineSetup,
    make_book,
    make_parts,
    ours,
)
from loraplex_server.simulator.trace import Trace
from loraplex_server.simulator.warmth import WARM_S, warm_up
from loraplex_server.simulator.workloads import (
    CHAMELEON_OUTPUT,
    CHAMELEON_PROMPT,
    zipf_shares,
    zipf_trace,
)

GIB: Final = 2.0**30
OBJECTIVE: Final = Objective()


@dataclass(frozen=True)
class Case:
    """What is asked of the fleet, and the memory of its replicas.

    Attributes:
        cv: coefficient of variation of the gaps between requests; 1: Poisson.
        host_gib: of each replica, for adapters.
        has_disk: every replica's own disk holds all files; else they come from an object store.
        settle_s: left out of the figures, at the start.
    """

    num_adapters: int = 100_000
    rate: float = 1000.0
    zipf_s: float = 1.0
    cv: float = 1.0
    host_gib: float = 128.0
    has_disk: bool = False
    settle_s: float = 0.8
    measured_s: float = 2.7
    seed: int = 42

    @property
    def trace(self) -> Trace:
        """The requests; they begin at WARM_S."""
        trace = zipf_trace(
            num_adapters=self.num_adapters,
            rate=self.rate,
            duration_s=self.settle_s + self.measured_s,
            zipf_s=self.zipf_s,
            cv=self.cv,
            seed=self.seed,
        )
        rng = np.random.default_rng(self.seed + 1)
        return replace(
            trace,
            arrival_s=trace.arrival_s + WARM_S,
            prompt_len=CHAMELEON_PROMPT.draw(rng, len(trace)),
            output_len=CHAMELEON_OUTPUT.draw(rng, len(trace)),
        )

    @property
    def setup(self) -> EngineSetup:
        return ours(
            find_setting("8B mixed"),
            find_hardware("h200"),
            inefficiency=S_LORA_INEFFICIENCY,
            max_step_tokens=A100_STEP_TOKENS,
            host_bytes=self.host_gib * GIB,
            store=None if self.has_disk else StoreSpeed(),
            policy=PolicyChoice(order="fcfs", overload="none", has_prefix_cache=False),
        )


def case_of(options: Options, **changes: float) -> Case:
    """Return the full case, or a small one that has the same proportions for a first look."""
    if options.is_quick:
        small = Case(num_adapters=3000, rate=120.0, host_gib=4.0, settle_s=0.3, measured_s=0.7)
        return replace(small, seed=options.seed)
    return replace(Case(seed=options.seed), **changes)  # type: ignore[arg-type]


def run_case(
    case: Case, routing: str, num_replicas: int, deaths: tuple[Death, ...] = ()
) -> tuple[Outcome, FleetFigures]:
    """Run the case on so many warm replicas."""
    setup, trace = case.setup, case.trace
    router = make_router(routing, num_replicas, case.seed)
    shares = zipf_shares(case.num_adapters, case.zipf_s)
    if isinstance(router, PopularityPlacement):
        router.learn(shares.tolist())
    book = make_book(setup, trace)
    fleet = Fleet(book, lambda: make_parts(setup), num_replicas, router, deaths)
    warm_up(fleet, router, shares, case.rate)
    outcome = fleet.run()
    figures = fleet_figures(
        outcome,
        num_replicas,
        OBJECTIVE,
        page_bytes=fleet.replicas[0].parts.page_bytes,
        since_s=WARM_S + case.settle_s,
    )
    return outcome, figures


def parameters_of(case: Case) -> dict[str, str | int | float]:
    """Return everything that decides a report on this case."""
    setup = case.setup
    return {
        "model": setup.model.name,
        "hardware": setup.hardware.key,
        "factor": setup.inefficiency.factor,
        "adapters": case.num_adapters,
        "rate": case.rate,
        "zipf": case.zipf_s,
        "settle_s": case.settle_s,
        "measured_s": case.measured_s,
        "ttft_s": OBJECTIVE.ttft_s,
        "inter_token_s": OBJECTIVE.inter_token_s,
        "share": OBJECTIVE.share,
        "seed": case.seed,
    }
