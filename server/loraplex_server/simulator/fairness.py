"""How unevenly tenants were served, as VTC measures it (arXiv 2401.00588, section 5.1, and its
artifact's plotting scripts).

A request is worth `prompt + 2 x output` tokens of service, received evenly from first to last.
Rates are means over a window of 60 s around each of 100 ticks between 0 and the last arrival. The
gap at a tick is the sum over tenants of what each got less than the best served one, but no more
than what it asked for and did not get:

    gap(t) = sum_i min(max_j service_j - service_i, |demand_i - service_i|)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loraplex_server.simulator.results import Outcome
from loraplex_server.simulator.trace import Floats, Trace

WINDOW_S = 60.0
NUM_TICKS = 100


@dataclass(frozen=True)
class ServiceGap:
    """The gap over time, and each tenant's service; tokens per second.

    Attributes:
        most_accumulated: the largest difference between two tenants' accumulated service, tokens.
    """

    tick_s: Floats
    gap: Floats
    service: Floats
    most_accumulated: float

    @property
    def most(self) -> float:
        return float(self.gap.max())

    @property
    def mean(self) -> float:
        return float(self.gap.mean())


def service_gap(outcome: Outcome) -> ServiceGap:
    """Measure one run; `service` of the result is `[tenants, ticks]`."""
    last = float(np.nanmax(outcome.arrival_s))
    tick_s: Floats = np.arange(NUM_TICKS, dtype=np.float64) * (last / NUM_TICKS)
    since: Floats = tick_s - WINDOW_S / 2
    until: Floats = tick_s + WINDOW_S / 2
    service: Floats = _served(outcome, since, until) / WINDOW_S
    demand: Floats = _asked_for(outcome, since, until) / WINDOW_S
    short_of_best = service.max(axis=0) - service
    gap: Floats = np.minimum(short_of_best, np.abs(demand - service)).sum(axis=0)
    accumulated = _served(outcome, np.zeros(NUM_TICKS), tick_s)
    apart = (accumulated.max(axis=0) - accumulated.min(axis=0)).max()
    return ServiceGap(tick_s, gap, service, float(apart))


def _costs(trace: Trace) -> Floats:
    costs: Floats = (trace.prompt_len + 2 * trace.output_len).astype(np.float64)
    return costs


def _served(outcome: Outcome, since: Floats, until: Floats) -> Floats:
    """Return the service of each tenant within each window, `[tenants, windows]`."""
    trace = outcome.trace
    is_served = outcome.end_s - outcome.first_s > 1e-5  # False where NaN
    served = np.zeros((trace.num_tenants, len(since)))
    costs = _costs(trace)
    for index in np.flatnonzero(is_served):
        first, end = outcome.first_s[index], outcome.end_s[index]
        overlap = np.minimum(until, end) - np.maximum(since, first)
        share = np.maximum(0.0, overlap) / (end - first)
        served[trace.tenant[index]] += costs[index] * share
    return served


def _asked_for(outcome: Outcome, since: Floats, until: Floats) -> Floats:
    """Return what each tenant's arrivals within each window cost, `[tenants, windows]`."""
    trace = outcome.trace
    costs = _costs(trace)
    demand = np.zeros((trace.num_tenants, len(since)))
    for tenant in range(trace.num_tenants):
        own = trace.tenant == tenant
        order = np.argsort(outcome.arrival_s[own])
        arrival = outcome.arrival_s[own][order]
        total = np.concatenate([[0.0], np.cumsum(costs[own][order])])
        first = np.searchsorted(arrival, since, side="left")
        last = np.searchsorted(arrival, until, side="right")
        demand[tenant] = total[last] - total[first]
    return demand
