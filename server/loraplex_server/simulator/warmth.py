"""A fleet as it is after hours of the same traffic: pools and host memories full, uses counted.

Filling 100,000 adapters' places by simulating those hours would take days. Instead every replica's
own accounts are told of the uses that each adapter is expected to have had, as its share and the
router's homes for it say, and are given what is worth most by their own rule: in the pool, those
used most often; in host memory, of the others, those used most often per page. What the estimate
gets wrong, the first seconds of a run put right: leave them out of the figures.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from math import ceil, log, log2
from typing import Final

import numpy as np
from numpy.typing import NDArray

from loraplex_memory.accounts import PoolAccounts
from loraplex_memory.host_tier import DEFAULT_HALF_LIFE_S, HostTier
from loraplex_scheduler.fit import AdapterLayouts
from loraplex_server.simulator.fleet import Fleet
from loraplex_server.simulator.requests import adapter_id
from loraplex_server.simulator.routing.router import FleetView, Router
from loraplex_server.simulator.trace import Floats, Ints

#: Clocks start at 0 and uses lie in the past, so traces for warm fleets begin so much later.
WARM_S: Final = 3600.0

#: What running requests leave of a pool.
_POOL_SHARE: Final = 0.95

#: More uses than this tell nothing: what has them is far from leaving.
_MOST_USES: Final = 4
_LEAST_USES: Final = 2.0**-6

#: How long requests stay with a replica that is busy and not overloaded.
_USUAL_TTFT_S: Final = 0.05
_USUAL_TOKEN_S: Final = 0.012

_POOL_HALF_LIFE_S: Final = 300.0


@dataclass(frozen=True)
class _Demand:
    """What one replica is asked for: adapters, uses per second and pages of each, hottest first."""

    adapters: Ints
    rates: Floats
    num_pages: Ints


def warm_up(fleet: Fleet, router: Router, shares: Floats, rate: float) -> None:
    """Fill a new fleet, of which nothing was run.

    Args:
        shares: each adapter's share of all requests, falling.
        rate: requests per second of the whole fleet.
    """
    demands = _demands(fleet, router, shares, rate)
    pooled = np.zeros(len(shares), np.bool_)
    in_pools = []
    for replica, demand in zip(fleet.replicas, demands, strict=True):
        accounts = replica.parts.accounts
        in_pool = np.cumsum(demand.num_pages) <= int(accounts.num_free * _POOL_SHARE)
        _fill_pool(accounts, demand, in_pool)
        pooled[demand.adapters[in_pool]] = True
        in_pools.append(in_pool)
    if router.forgets:
        anywhere = np.flatnonzero(~pooled)
        rates = rate * shares[anywhere] / len(fleet.replicas)
        demands = [_demand(anywhere, rates, _sizes(fleet, len(shares)))] * len(demands)
        in_pools = [np.zeros(len(anywhere), np.bool_)] * len(demands)
    for replica, demand, in_pool in zip(fleet.replicas, demands, in_pools, strict=True):
        _fill_host(replica.parts.link.host, demand, ~in_pool)


def _demands(fleet: Fleet, router: Router, shares: Floats, rate: float) -> list[_Demand]:
    num_replicas = len(fleet.replicas)
    alive = list(range(num_replicas))
    sizes = _sizes(fleet, len(shares))
    rates: list[list[float]] = [[] for _ in alive]
    adapters: list[list[int]] = [[] for _ in alive]
    everywhere: list[int] = []
    spilled = _spilled(fleet, router, shares)
    for adapter, share in enumerate(shares.tolist()):
        homes = router.homes(adapter, share, alive)
        if len(homes) == num_replicas:
            everywhere.append(adapter)
            continue
        left = rate * share
        for home in homes:
            adapters[home].append(adapter)
            rates[home].append((1 - spilled[homes[0]]) * left / len(homes))
        left *= spilled[homes[0]]
        for other in router.spill(adapter, alive) if left else ():
            if other not in homes:
                adapters[other].append(adapter)
                rates[other].append((1 - spilled[other]) * left)
                left *= spilled[other]
    shared = np.array(everywhere, np.int64)
    shared_rates = rate * shares[shared] / num_replicas
    return [
        _demand(
            np.concatenate([shared, np.array(adapters[i], np.int64)]),
            np.concatenate([shared_rates, np.array(rates[i])]),
            sizes,
        )
        for i in alive
    ]


def _spilled(fleet: Fleet, router: Router, shares: Floats) -> list[float]:
    """Return the share of the requests of each replica's adapters that go elsewhere.

    Found by routing the trace's arrivals, with other adapters of the same popularity, to replicas
    that take a usual time for each answer.
    """
    trace, num_replicas = fleet.book.trace, len(fleet.replicas)
    view = FleetView([0] * num_replicas, list(range(num_replicas)))
    if not router.spill(0, view.alive):
        return [0.0] * num_replicas
    rng = np.random.default_rng(len(trace))
    drawn = np.searchsorted(np.cumsum(shares), rng.random(len(trace)) * shares.sum())
    stays_s = _USUAL_TTFT_S + _USUAL_TOKEN_S * trace.output_len
    ends: list[tuple[float, int]] = []
    num_asked, num_gone = [0] * num_replicas, [0] * num_replicas
    for at_s, adapter, stay_s in zip(
        trace.arrival_s.tolist(), drawn.tolist(), stays_s.tolist(), strict=True
    ):
        while ends and ends[0][0] <= at_s:
            view.in_flight[heapq.heappop(ends)[1]] -= 1
        homes = router.homes(adapter, float(shares[adapter]), view.alive)
        chosen = router.choose(adapter, view)
        num_asked[homes[0]] += 1
        num_gone[homes[0]] += chosen not in homes
        view.in_flight[chosen] += 1
        heapq.heappush(ends, (at_s + stay_s, chosen))
    return [gone / max(1, asked) for gone, asked in zip(num_gone, num_asked, strict=True)]


def _demand(adapters: Ints, rates: Floats, sizes: Ints) -> _Demand:
    order = np.argsort(-rates, kind="stable")
    return _Demand(adapters[order], rates[order], sizes[adapters[order]])


def _sizes(fleet: Fleet, num_adapters: int) -> Ints:
    """Return the pages of every adapter; ranks repeat, so few are computed."""
    book = fleet.book
    layouts = AdapterLayouts(fleet.replicas[0].parts.accounts.layout)
    period = len(book.adapters.ranks)
    few = [layouts.of(m).num_pages for i in range(period) if (m := book.manifest(i)) is not None]
    return np.array(few, np.int64)[np.arange(num_adapters) % period]


def _uses(rate: float, half_life_s: float) -> tuple[float, int]:
    """Return when, before WARM_S, so many uses at once leave the count that the rate leaves."""
    count = max(_LEAST_USES, rate * half_life_s / log(2))
    num = min(_MOST_USES, max(1, ceil(count)))
    ago_s = min(0.0, half_life_s * log2(count / num))
    return max(0.0, WARM_S + ago_s), num


def _fill_pool(accounts: PoolAccounts, demand: _Demand, chosen: NDArray[np.bool_]) -> None:
    residency, clock = accounts.residency, accounts.clock
    kept = np.flatnonzero(chosen).tolist()
    uses = {at: _uses(float(demand.rates[at]), _POOL_HALF_LIFE_S) for at in kept}
    # The coldest first, because the clock only goes forward.
    for at in sorted(kept, key=lambda i: uses[i][0]):
        when_s, num = uses[at]
        clock.set(when_s)
        name = adapter_id(int(demand.adapters[at]))
        for _ in range(num):
            residency.expect(name)
        residency.begin_load(name, int(demand.num_pages[at]))
        residency.finish_load(name)


def _fill_host(host: HostTier, demand: _Demand, left: NDArray[np.bool_]) -> None:
    others = np.flatnonzero(left)
    order = others[np.argsort(-(demand.rates / demand.num_pages)[others], kind="stable")]
    order = order[np.cumsum(demand.num_pages[order]) <= host.num_pages]
    for at in order.tolist():
        when_s, num = _uses(float(demand.rates[at]), DEFAULT_HALF_LIFE_S)
        name = adapter_id(int(demand.adapters[at]))
        host.reserve(name, int(demand.num_pages[at]), when_s)
        for _ in range(num - 1):
            host.lookup(name, when_s)
