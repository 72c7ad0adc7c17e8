"""From ten adapters to a hundred thousand, and from one replica to 64: ours against S-LoRA's.

S2 (Llama-7B, ranks 64 to 8) on A100-80Gs with S-LoRA's pool; eight tenants ask by Zipf 1.0. Both
engines have the same device and the same inefficiency; S-LoRA's reads adapters per row, as its
kernel does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from loraplex_server.simulator.experiments.options import Options
from loraplex_server.simulator.fairness import service_gap
from loraplex_server.simulator.hardware import find_hardware
from loraplex_server.simulator.models import find_setting
from loraplex_server.simulator.plots import panels_figure
from loraplex_server.simulator.report import Report, Row, Table
from loraplex_server.simulator.results import Outcome
from loraplex_server.simulator.routing.names import make_router
from loraplex_server.simulator.routing.router import Router
from loraplex_server.simulator.setup import (
    A100_STEP_TOKENS,
    S_LORA_INEFFICIENCY,
    EngineSetup,
    ours,
    simulate,
    slora,
)
from loraplex_server.simulator.suites import POOL_TOKENS
from loraplex_server.simulator.trace import Trace
from loraplex_server.simulator.workloads import zipf_trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NUM_TENANTS: Final = 8
_NUM_ADAPTERS: Final = (10, 100, 1000, 2000, 10_000, 100_000)
_NUM_REPLICAS: Final = (1, 4, 16, 64)
_FLEET_ADAPTERS: Final = 10_000
#: Of S-LoRA's table 3, and of each replica of a fleet.
_RATE: Final = 10.0
_REPLICA_RATE: Final = 8.0
_HEADERS = (
    "engine",
    "n",
    "replicas",
    "req/s",
    "TTFT p50",
    "TTFT p99",
    "TPOT p50",
    "attainment",
    "gap",
    "adapter hits",
    "host hits",
    "loads",
)
_SHOWN = {
    "throughput": ("requests per second", 3),
    "median TTFT": ("s", 4),
    "first token within 6 s": ("share", 7),
    "adapter hits": ("share of arrivals", 9),
}


def run_adapters(options: Options) -> Report:
    """Grow the number of adapters behind one replica."""
    duration_s = 10.0 if options.is_quick else 180.0
    counts = _NUM_ADAPTERS[:2] if options.is_quick else _NUM_ADAPTERS
    rows: list[Row] = []
    for name, engine in _engines().items():
        for num_adapters in counts:
            options.tell(f"{name}: {num_adapters} adapters")
            trace = _trace(num_adapters, _RATE, duration_s, options.seed)
            rows.append(_row(name, num_adapters, 1, simulate(engine, trace)))
    parameters = _parameters(options, duration_s) | {"rate": _RATE}
    plot = _plot(rows, x=1, x_label="adapters", per_replica=False)
    table = Table("Adapters behind one replica", _HEADERS, rows)
    return Report("adapters", parameters, [table], plots={"adapters.svg": plot})


def run_replicas(options: Options) -> Report:
    """Grow the fleet and the load with it."""
    duration_s = 4.0 if options.is_quick else 40.0
    counts = _NUM_REPLICAS[:2] if options.is_quick else _NUM_REPLICAS
    engines = _engines()
    rows: list[Row] = []
    for num_replicas in counts:
        trace = _trace(_FLEET_ADAPTERS, _REPLICA_RATE * num_replicas, duration_s, options.seed)
        make = partial(make_router, num_replicas=num_replicas, seed=options.seed)
        arms: dict[str, tuple[EngineSetup, Router]] = {
            "ours, affine": (engines["ours"], make("affine")),
            "ours, round robin": (engines["ours"], make("round-robin")),
            "S-LoRA, round robin": (engines["S-LoRA"], make("round-robin")),
        }
        for name, (engine, router) in arms.items():
            options.tell(f"{name}: {num_replicas} replicas")
            outcome = simulate(engine, trace, num_replicas=num_replicas, router=router)
            rows.append(_row(name, _FLEET_ADAPTERS, num_replicas, outcome))
    rows.sort(key=lambda row: str(row[0]))
    parameters = _parameters(options, duration_s) | {"rate per replica": _REPLICA_RATE}
    plot = _plot(rows, x=2, x_label="replicas", per_replica=True)
    table = Table(f"{_FLEET_ADAPTERS} adapters behind a fleet", _HEADERS, rows)
    return Report("replicas", parameters, [table], plots={"replicas.svg": plot})


def _engines() -> dict[str, EngineSetup]:
    setting, hardware = find_setting("S2"), find_hardware("a100-80g")
    pool_tokens = POOL_TOKENS["S2"]
    mine = ours(
        setting,
        hardware,
        pool_tokens=pool_tokens,
        inefficiency=S_LORA_INEFFICIENCY,
        max_step_tokens=A100_STEP_TOKENS,
    )
    return {"ours": mine, "S-LoRA": slora(setting, hardware, pool_tokens=pool_tokens)}


def _trace(num_adapters: int, rate: float, duration_s: float, seed: int) -> Trace:
    return zipf_trace(
        num_adapters=num_adapters,
        rate=rate,
        duration_s=duration_s,
        num_tenants=_NUM_TENANTS,
        seed=seed,
    )


def _parameters(options: Options, duration_s: float) -> dict[str, str | int | float]:
    return {
        "setting": "S2",
        "hardware": "a100-80g",
        "pool_tokens": POOL_TOKENS["S2"],
        "zipf": 1.0,
        "tenants": _NUM_TENANTS,
        "duration_s": duration_s,
        "factor": S_LORA_INEFFICIENCY.factor,
        "seed": options.seed,
    }


def _row(name: str, num_adapters: int, num_replicas: int, outcome: Outcome) -> Row:
    s = outcome.summary()
    return [
        name,
        num_adapters,
        num_replicas,
        s.throughput,
        s.ttft_p50,
        s.ttft_p99,
        s.tpot_p50,
        s.attainment,
        service_gap(outcome).most,
        s.adapter_hit_rate,
        s.host_hit_rate,
        s.num_loads,
    ]


def _plot(rows: list[Row], *, x: int, x_label: str, per_replica: bool) -> Callable[[], Figure]:
    panels = []
    for title, (unit, column) in _SHOWN.items():
        is_shared = per_replica and title == "throughput"
        series: dict[str, tuple[list[float], list[float]]] = {}
        for row in rows:
            xs, ys = series.setdefault(str(row[0]), ([], []))
            num_sharing = float(row[2] or 1) if is_shared else 1.0
            xs.append(float(row[x] or 0))
            ys.append(float(row[column] or 0) / num_sharing)
        panels.append((title, f"{unit} and replica" if is_shared else unit, series))
    return panels_figure(panels, x_label=x_label)
