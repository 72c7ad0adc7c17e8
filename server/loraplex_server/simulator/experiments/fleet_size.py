"""How many replicas, and how much host memory, serve 100,000 adapters at 1,000 requests per second.

For every routing policy and host memory the fewest replicas that give 99 % of requests their first
token within 1 s and their others every 50 ms on average; and what each policy does with one fleet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from loraplex_server.simulator.experiments.fleet_case import (
    OBJECTIVE,
    Case,
    case_of,
    parameters_of,
    run_case,
)
from loraplex_server.simulator.experiments.options import Options
from loraplex_server.simulator.fleet_figures import FleetFigures
from loraplex_server.simulator.plots import bars_figure
from loraplex_server.simulator.report import Cell, Check, Report, Row, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOST_GIB: Final = (512.0, 128.0, 32.0)
#: Replicas to try. The arithmetic of the load alone takes 14.8; with fewer than 17 queues grow, if
#: slower than these short runs can tell.
SIZES: Final = (17, 18, 20, 24)
_FLEET: Final = 18
_ALL: Final = (
    "random",
    "least-loaded",
    "consistent",
    "bounded",
    "bounded-150",
    "two-choices",
    "gateway",
    "gateway-lora",
    "popularity",
)
_SIZED: Final = ("random", "bounded", "bounded-150", "two-choices", "popularity")
_FEW: Final = ("random", "popularity")
_HEADERS: Final = (
    "routing",
    "attainment",
    "TTFT p50",
    "TTFT p99",
    "inter-token p99",
    "in pool",
    "in host",
    "cold",
    "loads GB/s",
    "store GB/s",
    "imbalance",
    "busy",
)


class _Runs:
    """Runs cases and remembers them: searches and tables share some."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._done: dict[tuple[Case, str, int], FleetFigures] = {}

    def figures(self, case: Case, routing: str, num_replicas: int) -> FleetFigures:
        key = (case, routing, num_replicas)
        if key not in self._done:
            memory = "disk" if case.has_disk else f"{case.host_gib:g} GiB"
            traffic = f"Zipf {case.zipf_s:g}, cv {case.cv:g}"
            self._done[key] = found = run_case(case, routing, num_replicas)[1]
            self._options.tell(
                f"{routing}: {num_replicas} replicas, {memory}, {traffic}: "
                f"{found.attainment:.4f} attained, TTFT p99 {found.ttft_p99:.3f} s, "
                f"{found.cold:.4f} cold, imbalance {found.imbalance:.2f}, "
                f"loads {found.loaded_bytes_per_s / 1e9:.1f} GB/s"
            )
        return self._done[key]

    def fewest(self, case: Case, routing: str, sizes: Sequence[int]) -> int | None:
        """Return the least of the sizes that meets the objective; None if the largest does not.

        The first and the last are tried first, then those behind the first in doubling steps.
        """
        if self._meets(case, routing, sizes[0]):
            return sizes[0]
        if not self._meets(case, routing, sizes[-1]):
            return None
        failed, step = 0, 1
        while not self._meets(case, routing, sizes[min(failed + step, len(sizes) - 1)]):
            failed, step = failed + step, step * 2
        between = sizes[failed + 1 : failed + step + 1]
        return next(size for size in between if self._meets(case, routing, size))

    def _meets(self, case: Case, routing: str, num_replicas: int) -> bool:
        return self.figures(case, routing, num_replicas).meets(OBJECTIVE)


def run(options: Options) -> Report:
    """Compare the policies on one fleet, find the fewest replicas, and change the traffic."""
    case, runs = case_of(options), _Runs(options)
    num_replicas = 3 if options.is_quick else _FLEET
    policies = Table(
        f"{num_replicas} replicas with {case.host_gib:g} GiB of host memory each",
        _HEADERS,
        [_row(name, runs.figures(case, name, num_replicas)) for name in _ALL],
    )
    sizes = (2, 3) if options.is_quick else SIZES
    hosts = (case.host_gib,) if options.is_quick else HOST_GIB
    sized = _FEW if options.is_quick else _SIZED
    fewest = {name: _fewest_by_memory(runs, case, name, sizes, hosts) for name in sized}
    return Report(
        "fleet",
        parameters_of(case),
        [
            policies,
            _fewest_table(fewest, sizes, hosts),
            _traffic_table(runs, case, num_replicas, options),
        ],
        _checks(policies),
        {"fleet-policies.svg": _policy_plot(policies)},
    )


_Fewest = dict[str, int | None]


def _fewest_by_memory(
    runs: _Runs, case: Case, routing: str, sizes: Sequence[int], hosts: Sequence[float]
) -> _Fewest:
    """Search from the most memory to the least: with less it takes as many replicas or more."""
    found: _Fewest = {}
    left = sizes
    for host_gib in hosts:
        fewest = runs.fewest(replace(case, host_gib=host_gib), routing, left) if left else None
        found[f"{host_gib:g} GiB"] = fewest
        left = sizes[sizes.index(fewest) :] if fewest is not None else ()
    if routing in _FEW:
        found["disk"] = runs.fewest(replace(case, has_disk=True), routing, sizes)
    return found


def _fewest_table(
    fewest: dict[str, _Fewest], sizes: Sequence[int], hosts: Sequence[float]
) -> Table:
    columns = [*(f"{host:g} GiB" for host in hosts), "disk"]
    rows: list[Row] = [
        [name, *(_number(found, column, sizes) for column in columns)]
        for name, found in fewest.items()
    ]
    return Table("Fewest replicas, by host memory of each", ("routing", *columns), rows)


def _number(found: _Fewest, column: str, sizes: Sequence[int]) -> Cell:
    """Return the number of replicas, that there are too few, or nothing where it was not asked."""
    if column not in found:
        return None
    return found[column] or f"> {sizes[-1]}"


def _traffic_table(runs: _Runs, case: Case, num_replicas: int, options: Options) -> Table:
    # Three of these differ from the case in popularity, one in arrivals.
    traffics = {
        "Zipf 0.8": replace(case, zipf_s=0.8),
        "Zipf 1.2": replace(case, zipf_s=1.2),
        "bursty (cv 4)": replace(case, cv=4.0),
    }
    if options.is_quick:
        traffics = {"bursty (cv 4)": traffics["bursty (cv 4)"]}
    rows = [
        [label, *_row(name, runs.figures(changed, name, num_replicas))]
        for label, changed in traffics.items()
        for name in _FEW
    ]
    title = f"Other traffic, {num_replicas} replicas, {case.host_gib:g} GiB"
    return Table(title, ("traffic", *_HEADERS), rows)


def _row(name: str, figures: FleetFigures) -> Row:
    f = figures
    return [
        name,
        f.attainment,
        f.ttft_p50,
        f.ttft_p99,
        f.inter_token_p99,
        f.in_pool,
        f.in_host,
        f.cold,
        f.loaded_bytes_per_s / 1e9,
        f.fetched_bytes_per_s / 1e9,
        f.imbalance,
        f.utilization,
    ]


def _checks(policies: Table) -> list[Check]:
    cold = {str(row[0]): float(row[_HEADERS.index("cold")] or 0) for row in policies.rows}
    return [
        Check("cold requests: popularity / random", cold["popularity"] / cold["random"], 0.1, True)
    ]


def _policy_plot(policies: Table) -> Callable[[], Figure]:
    shown = {
        "adapter found cold": ("share of requests", "cold"),
        "imbalance": ("most / mean", "imbalance"),
        "P99 TTFT": ("s", "TTFT p99"),
    }
    panels = [
        (
            title,
            unit,
            {str(row[0]): float(row[_HEADERS.index(column)] or 0) for row in policies.rows},
        )
        for title, (unit, column) in shown.items()
    ]
    return bars_figure(panels)
