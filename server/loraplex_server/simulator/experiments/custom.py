"""One run of your own: any engine, device and workload."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from loraplex_scheduler.policies import (
    ADMISSIONS,
    EVICTIONS,
    ORDERS,
    PolicyChoice,
)
from loraplex_server.simulator.errors import SimulationError
from loraplex_server.simulator.experiments.options import Options
from loraplex_server.simulator.fairness import service_gap
from loraplex_server.simulator.hardware import all_hardware, find_hardware
from loraplex_server.simulator.lmsys import load_trace, matched_trace
from loraplex_server.simulator.models import SETTINGS, find_setting
from loraplex_server.simulator.report import Report, Row, Table
from loraplex_server.simulator.roofline import Inefficiency
from loraplex_server.simulator.routing.names import ROUTERS, make_router
from loraplex_server.simulator.setup import EngineSetup, ours, simulate, slora
from loraplex_server.simulator.trace import Trace
from loraplex_server.simulator.workloads import (
    chameleon_trace,
    multi_turn_trace,
    per_adapter_trace,
    punica_trace,
    slora_trace,
    zipf_trace,
)

WORKLOADS = (
    "slora",
    "per-adapter",
    "zipf",
    "chameleon",
    "multi-turn",
    "lmsys",
    "punica-distinct",
    "punica-uniform",
    "punica-skewed",
    "punica-identical",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what one run can be told."""
    parser.add_argument("--engine", choices=("ours", "slora"), default="ours")
    parser.add_argument("--setting", choices=tuple(SETTINGS), default="S1", help="base, adapters")
    parser.add_argument("--hardware", choices=tuple(all_hardware()), default="a100-80g")
    parser.add_argument("--workload", choices=WORKLOADS, default="zipf")
    parser.add_argument("--log", type=Path, help="your LMSYS log, for --workload lmsys")
    parser.add_argument("--adapters", type=_at_least(0, int), default=1000, metavar="N")
    parser.add_argument("--rate", type=_at_least(1e-6, float), default=8.0, help="requests per s")
    parser.add_argument("--duration", type=_at_least(1e-3, float), default=60.0, metavar="S")
    parser.add_argument("--skew", type=_at_least(0.0, float), default=1.0, help="Zipf, or alpha")
    parser.add_argument("--cv", type=_at_least(1e-3, float), default=1.0, help="of the gaps")
    parser.add_argument("--replicas", type=_at_least(1, int), default=1, metavar="N")
    parser.add_argument("--router", choices=tuple(ROUTERS), default="affine")
    parser.add_argument("--pool-tokens", type=_at_least(1, int), metavar="N")
    parser.add_argument("--host-bytes", type=_at_least(0.0, float), default=256e9, metavar="N")
    parser.add_argument("--step-tokens", type=_at_least(1, int), default=512, metavar="N")
    parser.add_argument("--factor", type=_at_least(0.0, float), help="times the roofline")
    parser.add_argument("--order", choices=ORDERS)
    parser.add_argument("--admission", choices=ADMISSIONS)
    parser.add_argument("--eviction", choices=EVICTIONS)
    parser.add_argument("--no-prefix-cache", action="store_true")
    parser.add_argument(
        "--promise", type=_at_least(1e-3, float), metavar="S", help="TTFT asked for"
    )


def run(options: Options, asked: argparse.Namespace) -> Report:
    """Simulate once and report every metric."""
    trace = make_trace(asked, options.seed)
    setup = make_setup(asked)
    router = make_router(asked.router, asked.replicas, options.seed)
    options.tell(f"{trace.name}: {len(trace)} requests")
    outcome = simulate(setup, trace, num_replicas=asked.replicas, router=router)
    slo_s = asked.promise or 6.0
    rows: list[Row] = [[name, value] for name, value in outcome.summary(slo_s).as_dict().items()]
    if trace.num_tenants > 1:
        rows.append(["service_gap_most", service_gap(outcome).most])
    stated = {name: value for name, value in vars(asked).items() if value is not None}
    hidden = ("experiment", "json", "plots", "quick", "list", "quiet", "seed")
    parameters = {n: v for n, v in stated.items() if n not in hidden} | {"seed": options.seed}
    return Report("run", parameters, [Table(trace.name, ("metric", "value"), rows)])


def make_trace(asked: argparse.Namespace, seed: int) -> Trace:
    """Return the workload asked for.

    Raises:
        SimulationError: the arguments make none.
    """
    timing = {"rate": asked.rate, "duration_s": asked.duration, "seed": seed}
    name, num = asked.workload, asked.adapters
    if name != "slora" and num < 1:
        raise SimulationError(f"workload {name} needs --adapters 1 or more")
    if asked.rate * asked.duration < 1:
        raise SimulationError("no request would come: raise --rate or --duration")
    if name == "lmsys":
        return load_trace(asked.log, **timing) if asked.log else matched_trace(**timing)
    if asked.log:
        raise SimulationError("--log is for --workload lmsys")
    if name.startswith("punica-"):
        return punica_trace(popularity=name.removeprefix("punica-"))
    if name == "slora":
        if asked.skew <= 0:
            raise SimulationError("--skew is the exponent alpha of workload slora; above 0")
        return slora_trace(num_adapters=num, alpha=asked.skew, cv=asked.cv, **timing)
    if name == "chameleon":
        if num % 5 or num < 5:
            raise SimulationError("workload chameleon needs --adapters to be a multiple of 5")
        return chameleon_trace(num_adapters=num, zipf_s=asked.skew, **timing)
    if name == "multi-turn":
        return multi_turn_trace(num_adapters=num, zipf_s=asked.skew, **timing)
    if name == "per-adapter":
        return per_adapter_trace(num_adapters=num, zipf_s=asked.skew, cv=asked.cv, **timing)
    return zipf_trace(num_adapters=num, zipf_s=asked.skew, cv=asked.cv, **timing)


def make_setup(asked: argparse.Namespace) -> EngineSetup:
    """Return the engine asked for.

    Raises:
        SimulationError: an argument does not go with the engine, or the model not into the device.
    """
    make = ours if asked.engine == "ours" else slora
    setup = make(
        find_setting(asked.setting),
        find_hardware(asked.hardware),
        pool_tokens=asked.pool_tokens,
        host_bytes=asked.host_bytes,
        promise_s=asked.promise,
    )
    if asked.factor is not None:
        setup = replace(setup, inefficiency=Inefficiency(factor=asked.factor))
    chosen = {n: v for n in ("order", "admission", "eviction") if (v := getattr(asked, n))}
    if asked.engine == "slora":
        if chosen or asked.no_prefix_cache:
            raise SimulationError("S-LoRA's policies are fixed: leave the policy options out")
        return setup
    if asked.step_tokens < setup.max_running:
        raise SimulationError(f"--step-tokens must be at least {setup.max_running}")
    policy = PolicyChoice(**chosen, has_prefix_cache=not asked.no_prefix_cache)
    setup = replace(setup, policy=policy, max_step_tokens=asked.step_tokens)
    assert setup.num_pages > 0
    return setup


def _at_least(least: float, kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """Return a parser of numbers that are at least `least`."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0) - 1
        if not least <= value < float("inf"):
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} of at least {least:g}")
        return value

    return parse
