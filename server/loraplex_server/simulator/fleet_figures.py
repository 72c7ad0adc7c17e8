"""What a fleet's run comes to, over the requests that arrived in a span of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loraplex_server.simulator.results import Found, Outcome
from loraplex_server.simulator.trace import Floats


@dataclass(frozen=True)
class Objective:
    """What must hold for nearly all requests.

    Attributes:
        ttft_s: time to the first token.
        inter_token_s: mean time between the tokens of one answer.
        share: of requests that must have both.
    """

    ttft_s: float = 1.0
    inter_token_s: float = 0.05
    share: float = 0.99


@dataclass(frozen=True)
class FleetFigures:
    """Times in seconds; shares of requests.

    Attributes:
        attainment: share of requests with both objectives.
        in_pool, in_host, cold: where requests found their adapter.
        loaded_bytes_per_s, fetched_bytes_per_s: into pools; from the object store, whole fleet.
        imbalance: the most requests of one replica / the mean.
        utilization: share of time in which replicas computed, mean.
    """

    attainment: float
    ttft_p50: float
    ttft_p99: float
    inter_token_p99: float
    in_pool: float
    in_host: float
    cold: float
    loaded_bytes_per_s: float
    fetched_bytes_per_s: float
    imbalance: float
    utilization: float

    def meets(self, objective: Objective) -> bool:
        return self.attainment >= objective.share


def fleet_figures(
    outcome: Outcome,
    num_replicas: int,
    objective: Objective,
    *,
    page_bytes: float,
    since_s: float = 0.0,
    until_s: float = float("inf"),
) -> FleetFigures:
    """Compute the figures of requests that arrived in [since_s, until_s).

    Loads and utilization are those of the whole run.
    """
    trace, counters = outcome.trace, outcome.counters
    is_asked = (outcome.arrival_s >= since_s) & (outcome.arrival_s < until_s)
    ttft, pace = outcome.ttft_s[is_asked], inter_token_s(outcome)[is_asked]
    is_met = (ttft <= objective.ttft_s) & (pace <= objective.inter_token_s)
    found = outcome.found[is_asked]
    by_replica = np.bincount(outcome.replica[is_asked], minlength=num_replicas)
    span_s = float(trace.arrival_s[-1] - trace.arrival_s[0])
    end_s = outcome.end_s[~np.isnan(outcome.end_s)]
    return FleetFigures(
        attainment=float(is_met.mean()),
        ttft_p50=float(np.nanpercentile(ttft, 50)),
        ttft_p99=float(np.nanpercentile(ttft, 99)),
        inter_token_p99=float(np.nanpercentile(pace, 99)),
        in_pool=float((found == Found.POOL).mean()),
        in_host=float((found == Found.HOST).mean()),
        cold=float((found == Found.COLD).mean()),
        loaded_bytes_per_s=counters.num_loaded_pages * page_bytes / span_s,
        fetched_bytes_per_s=counters.fetched_bytes / span_s,
        imbalance=float(by_replica.max() / by_replica.mean()),
        utilization=counters.busy_s / num_replicas / float(end_s.max() - trace.arrival_s[0]),
    )


def inter_token_s(outcome: Outcome) -> Floats:
    """Return each answer's mean time between tokens; 0 for answers of one token."""
    gaps = np.maximum(1, outcome.trace.output_len - 1)
    pace: Floats = (outcome.end_s - outcome.first_s) / gaps
    return pace
