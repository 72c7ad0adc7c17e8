"""What the death of a replica costs, by how adapters are placed: warm caches, then one is gone.

Zipf 0.8, at which no adapter alone is too much for a replica, so that hashes without a bound keep
up. What the dead had not answered is asked again after 0.5 s and has waited since it first came.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from loraplex_server.simulator.experiments.fleet_case import (
    OBJECTIVE,
    Case,
    case_of,
    parameters_of,
    run_case,
)
from loraplex_server.simulator.experiments.options import Options
from loraplex_server.simulator.fleet import Death
from loraplex_server.simulator.plots import panels_figure
from loraplex_server.simulator.report import Check, Report, Row, Table
from loraplex_server.simulator.results import Found, Outcome
from loraplex_server.simulator.routing.names import make_router
from loraplex_server.simulator.warmth import WARM_S
from loraplex_server.simulator.workloads import zipf_shares

_ROUTINGS: Final = ("random", "modulo", "consistent", "popularity")
_HEADERS: Final = ("routing", "adapters moved", "requests moved", "span", "cold", "TTFT p50")
_DEAD: Final = 0


def run(options: Options) -> Report:
    """Let one of 20 replicas die under load, once per policy."""
    case = replace(case_of(options), zipf_s=0.8)
    num_replicas, before_s, after_s = 20, 1.0, 8.0
    if options.is_quick:
        num_replicas, before_s, after_s = 4, 0.3, 0.4
    else:
        case = replace(case, host_gib=512.0, settle_s=1.0)
    case = replace(case, measured_s=before_s + after_s)
    death_s = WARM_S + case.settle_s + before_s
    spans = {
        "before": (death_s - before_s, death_s - before_s / 2),
        "first quarter after": (death_s, death_s + after_s / 4),
        "last quarter after": (death_s + after_s * 3 / 4, death_s + after_s),
    }
    rows: list[Row] = []
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for routing in _ROUTINGS:
        options.tell(f"{routing}: {num_replicas} replicas, one dies")
        moved = moved_shares(case, routing, num_replicas)
        outcome, _ = run_case(case, routing, num_replicas, (Death(death_s, _DEAD),))
        rows += [[routing, *moved, name, *_span(outcome, *span)] for name, span in spans.items()]
        lines[routing] = _attainment_by_second(outcome, death_s)
    table = Table(
        f"One of {num_replicas} replicas dies",
        (*_HEADERS, "TTFT p99", "attainment"),
        rows,
    )
    by_name = {str(row[0]): float(row[1] or 0) for row in rows}
    check = Check(
        "adapters moved by consistent hashing x replicas",
        by_name["consistent"] * num_replicas,
        1.5,
        is_at_most=True,
    )
    panels = [("attainment after the death of one", "share of requests", lines)]
    plot = panels_figure(panels, x_label="s after", is_log_x=False)
    parameters = parameters_of(case) | {"replicas": num_replicas, "host_gib": case.host_gib}
    return Report("fleet-death", parameters, [table], [check], {"fleet-death.svg": plot})


def moved_shares(case: Case, routing: str, num_replicas: int) -> tuple[float, float]:
    """Return the shares of adapters, and of requests, whose homes are others after the death.

    All of them where homes are not what decides: there nothing was in one place.
    """
    router = make_router(routing, num_replicas, case.seed)
    before, after = list(range(num_replicas)), list(range(num_replicas))
    after.remove(_DEAD)
    shares = zipf_shares(case.num_adapters, case.zipf_s)
    is_moved = np.array(
        [
            len(homes := router.homes(adapter, share, before)) < num_replicas
            and not set(router.homes(adapter, share, after)) <= set(homes)
            for adapter, share in enumerate(shares.tolist())
        ]
    )
    return float(is_moved.mean()), float(shares[is_moved].sum())


def _span(outcome: Outcome, since_s: float, until_s: float) -> tuple[float, float, float, float]:
    is_asked = (outcome.arrival_s >= since_s) & (outcome.arrival_s < until_s)
    ttft = outcome.ttft_s[is_asked]
    return (
        float((outcome.found[is_asked] == Found.COLD).mean()),
        float(np.percentile(ttft, 50)),
        float(np.percentile(ttft, 99)),
        float((ttft <= OBJECTIVE.ttft_s).mean()),
    )


def _attainment_by_second(outcome: Outcome, death_s: float) -> tuple[list[float], list[float]]:
    """Return the seconds since the death, and the share of their requests in time."""
    second = np.floor(outcome.arrival_s - death_s)
    seconds = np.unique(second)
    in_time = [float((outcome.ttft_s[second == at] <= OBJECTIVE.ttft_s).mean()) for at in seconds]
    return seconds.tolist(), in_time
