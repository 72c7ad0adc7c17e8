"""Half again as many requests as can be served: whose first token comes within six seconds?

S-LoRA's setting (S4, 400 adapters, A100-80G). The load is 1.5 times what our engine completes when
it is flooded. The oracle is a server of that very rate which knows the whole trace beforehand, the
lengths of answers included, and serves the largest set of requests that can be in time.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from loraplex_scheduler.policies import PolicyChoice
from loraplex_server.simulator.experiments.options import Options
from loraplex_server.simulator.hardware import find_hardware
from loraplex_server.simulator.models import find_setting
from loraplex_server.simulator.oracle import FluidServer, upper_bound
from loraplex_server.simulator.plots import panels_figure
from loraplex_server.simulator.report import Check, Report, Row, Table
from loraplex_server.simulator.results import SLORA_SLO_S, Outcome, steady_throughput
from loraplex_server.simulator.roofline import StepWork
from loraplex_server.simulator.setup import (
    A100_STEP_TOKENS,
    S_LORA_INEFFICIENCY,
    EngineSetup,
    make_parts,
    ours,
    simulate,
    slora,
)
from loraplex_server.simulator.suites import POOL_TOKENS
from loraplex_server.simulator.trace import Floats, Trace
from loraplex_server.simulator.workloads import slora_trace

_OVERLOAD = 1.5
_NUM_ADAPTERS = 400
_FLOOD_RATE = 20.0
_TARGETS = {1.0: 0.9, 8.0: 0.65}
_HEADERS = ("cv", "policy", "attainment", "oracle", "share", "req/s", "TTFT p99", "turned away")


def run(options: Options) -> Report:
    """Measure attainment by policy and burstiness, beside the oracle's."""
    duration_s = 20.0 if options.is_quick else 300.0
    cvs = (1.0,) if options.is_quick else (1.0, 2.0, 4.0, 6.0, 8.0)
    setups = _setups()
    options.tell("capacity")
    flood = _trace(_FLOOD_RATE, 10.0 if options.is_quick else 60.0, 1.0, options.seed)
    flooded = simulate(setups["fcfs"], flood)
    rate = _OVERLOAD * steady_throughput(flooded)
    rows: list[Row] = []
    checks = []
    series: dict[str, list[float]] = {}
    for cv in cvs:
        trace = _trace(rate, duration_s, cv, options.seed)
        server = engine_server(setups["fcfs"], flooded, trace)
        best = upper_bound(trace.arrival_s, SLORA_SLO_S, [server]) / len(trace)
        series.setdefault("oracle", []).append(best)
        for name, setup in setups.items():
            options.tell(f"cv={cv:g}: {name}")
            row = _row(cv, name, simulate(setup, trace), best)
            rows.append(row)
            series.setdefault(name, []).append(float(row[2] or 0))
            if name == "promises" and cv in _TARGETS:
                share = float(row[4] or 0)
                checks.append(Check(f"cv {cv:g}: attainment / oracle", share, _TARGETS[cv]))
    panel = ("attainment", "first token within 6 s", {n: (cvs, y) for n, y in series.items()})
    plot = panels_figure([panel], x_label="coefficient of variation of gaps", is_log_x=False)
    parameters = {
        "setting": "S4",
        "hardware": "a100-80g",
        "pool_tokens": POOL_TOKENS["S4"],
        "adapters": _NUM_ADAPTERS,
        "slo_s": SLORA_SLO_S,
        "rate": round(rate, 3),
        "duration_s": duration_s,
        "factor": S_LORA_INEFFICIENCY.factor,
        "seed": options.seed,
    }
    table = Table(f"Attainment at {_OVERLOAD:g} x capacity", _HEADERS, rows)
    return Report("overload", parameters, [table], checks, {"overload.svg": plot})


def engine_server(setup: EngineSetup, flooded: Outcome, trace: Trace) -> FluidServer:
    """Return the oracle's server: it works at the rate of the engine under a flood.

    Requests share the engine's time in proportion to the arithmetic of their prompts plus the
    memory traffic of their decodes. What running requests owe at most is a full batch's work, as
    many as the flood had running, each just begun.
    """
    first, last = np.nanquantile(flooded.end_s, [0.25, 0.75])
    running_s = np.minimum(flooded.end_s, last) - np.maximum(flooded.first_s, first)
    num_running = float(np.maximum(0.0, running_s).sum() / (last - first))
    ended = (flooded.end_s > first) & (flooded.end_s <= last)
    scale = (last - first) / _shares_s(setup, flooded.trace, num_running)[ended].sum()
    work_s: Floats = scale * _shares_s(setup, trace, num_running)
    return FluidServer("engine", work_s, num_running * float(work_s.mean()))


def _shares_s(setup: EngineSetup, trace: Trace, num_running: float) -> Floats:
    """Return each request's part of the device's time, up to a common factor."""
    roofline = make_parts(setup).roofline
    prompt, output = trace.prompt_len.astype(np.float64), trace.output_len.astype(np.float64)
    token_s = roofline.compute_s(StepWork(1, 0, 0, 0.0, 0))
    weights_s = roofline.traffic_s(StepWork(0, 0, 0, 0.0, 0))
    context_s = roofline.traffic_s(StepWork(0, 0, 1, 0.0, 0)) - weights_s
    decode_s = output * (weights_s / num_running + context_s * (prompt + output / 2))
    shares: Floats = prompt * token_s + decode_s
    return shares


def _row(cv: float, name: str, outcome: Outcome, best: float) -> Row:
    summary = outcome.summary()
    return [
        cv,
        name,
        summary.attainment,
        best,
        summary.attainment / best,
        summary.throughput,
        summary.ttft_p99,
        summary.num_rejected,
    ]


def _trace(rate: float, duration_s: float, cv: float, seed: int) -> Trace:
    return slora_trace(
        num_adapters=_NUM_ADAPTERS, rate=rate, duration_s=duration_s, cv=cv, seed=seed
    )


def _setups() -> dict[str, EngineSetup]:
    """Return the engines compared: ours in three ways, S-LoRA's in two, all on equal steps."""
    setting, hardware = find_setting("S4"), find_hardware("a100-80g")
    pool_tokens = POOL_TOKENS["S4"]
    base = ours(
        setting,
        hardware,
        pool_tokens=pool_tokens,
        max_step_tokens=A100_STEP_TOKENS,
        inefficiency=S_LORA_INEFFICIENCY,
    )
    theirs = slora(setting, hardware, pool_tokens=pool_tokens)
    return {
        "promises": replace(base, promise_s=SLORA_SLO_S),
        "fcfs": replace(base, policy=PolicyChoice(order="fcfs", overload="none")),
        "lcfs": replace(base, policy=PolicyChoice(order="lcfs", overload="none")),
        "S-LoRA": theirs,
        "S-LoRA abort": replace(theirs, aborts_early=SLORA_SLO_S),
    }
