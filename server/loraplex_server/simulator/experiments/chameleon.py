"""How much load keeps the P99 of TTFT within five times the unloaded TTFT, on Chameleon's mix.

Llama-7B on an A40, 100 adapters of ranks 8 to 128, Poisson arrivals (arXiv 2411.17741). All engines
have the same steps and loads; they differ in what they decide. The unloaded TTFT is S-LoRA's, the
slower one. S-LoRA's is measured as published, and again without the gate that lets newcomers in
every ten steps only, which alone can take the SLO.
"""

from __future__ import annotations

from dataclasses import replace

from loraplex_scheduler.policies import PolicyChoice
from loraplex_server.simulator.experiments.options import Options
from loraplex_server.simulator.hardware import find_hardware
from loraplex_server.simulator.models import MODELS, AdapterSet, Setting
from loraplex_server.simulator.plots import panels_figure
from loraplex_server.simulator.report import Check, Report, Row, Table
from loraplex_server.simulator.results import Summary
from loraplex_server.simulator.setup import (
    A100_STEP_TOKENS,
    S_LORA_INEFFICIENCY,
    EngineSetup,
    ours,
    simulate,
    slora,
)
from loraplex_server.simulator.workloads import CHAMELEON_RANKS, chameleon_trace

_SLO_TIMES = 5.0
_UNLOADED_RATE = 0.05
_MAX_RATE = 16.0
_TOLERANCE = 0.05
_HEADERS = ("engine", "R", "TTFT p50", "TTFT p99", "TPOT p50", "hits", "loads", "preemptions")
_RATES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)


def run(options: Options) -> Report:
    """Find each engine's largest load within the SLO."""
    duration_s = 20.0 if options.is_quick else 400.0
    unloaded_s = duration_s * 50
    engines = _engines()
    slo_s = _SLO_TIMES * _measure(engines["S-LoRA"], _UNLOADED_RATE, unloaded_s, options).ttft_mean
    rows: list[Row] = []
    p50: dict[str, tuple[tuple[float, ...], list[float]]] = {}
    p99: dict[str, tuple[tuple[float, ...], list[float]]] = {}
    best: dict[str, float] = {}
    for name, engine in engines.items():
        options.tell(f"{name}: sweep and bisection")
        rates = _RATES[::6] if options.is_quick else _RATES
        summaries = [_measure(engine, rate, duration_s, options) for rate in rates]
        p50[name] = rates, [summary.ttft_p50 for summary in summaries]
        p99[name] = rates, [summary.ttft_p99 for summary in summaries]
        rows += [_row(name, r, s) for r, s in zip(rates, summaries, strict=True)]
        best[name] = _largest_load(engine, slo_s, duration_s, options)
    loads = Table(
        f"Largest load with P99 of TTFT within {slo_s:.3f} s",
        ("engine", "req/s", "ours / this"),
        [[name, rate, best["ours"] / rate] for name, rate in best.items()],
    )
    checks = [
        Check(f"ours / {name}, load at the SLO", best["ours"] / best[name], 1.5)
        for name in engines
        if name.startswith("S-LoRA")
    ]
    panels = [("median TTFT", "s", p50), ("P99 TTFT", "s", p99)]
    plot = panels_figure(panels, x_label="requests per second", is_log_x=False, is_log_y=True)
    parameters = {
        "model": "llama-7b",
        "hardware": "a40",
        "adapters": 100,
        "ranks": CHAMELEON_RANKS,
        "slo_s": round(slo_s, 3),
        "duration_s": duration_s,
        "factor": S_LORA_INEFFICIENCY.factor,
        "seed": options.seed,
    }
    sweep = Table("By load", _HEADERS, rows)
    return Report("chameleon", parameters, [sweep, loads], checks, {"chameleon.svg": plot})


def _measure(engine: EngineSetup, rate: float, duration_s: float, options: Options) -> Summary:
    trace = chameleon_trace(rate=rate, duration_s=duration_s, seed=options.seed)
    return simulate(engine, trace).summary()


def _largest_load(engine: EngineSetup, slo_s: float, duration_s: float, options: Options) -> float:
    """Bisect for the largest rate whose P99 of TTFT is within the SLO; at least the tolerance."""
    low, high = _TOLERANCE, _MAX_RATE
    tolerance = 8.0 if options.is_quick else _TOLERANCE
    while high - low > tolerance:
        middle = (low + high) / 2
        # A trickle needs a longer run for its P99.
        span_s = max(duration_s, 300 / middle) if not options.is_quick else duration_s
        if _measure(engine, middle, span_s, options).ttft_p99 <= slo_s:
            low = middle
        else:
            high = middle
    return low


def _row(name: str, rate: float, summary: Summary) -> Row:
    return [
        name,
        rate,
        summary.ttft_p50,
        summary.ttft_p99,
        summary.tpot_p50,
        summary.adapter_hit_rate,
        summary.num_loads,
        summary.num_preemptions,
    ]


def _engines() -> dict[str, EngineSetup]:
    setting = Setting("chameleon", MODELS["llama-7b"], AdapterSet(CHAMELEON_RANKS))
    hardware = find_hardware("a40")
    mine = ours(
        setting,
        hardware,
        inefficiency=S_LORA_INEFFICIENCY,
        max_step_tokens=A100_STEP_TOKENS,
        policy=PolicyChoice(order="fcfs", overload="none"),
    )
    # With the same kernel as ours, so that only decisions differ.
    theirs = slora(setting, hardware, reads_adapters_per_row=False)
    return {
        "ours": mine,
        "ours, LRU": replace(
            mine, policy=PolicyChoice(order="fcfs", overload="none", eviction="lru")
        ),
        "S-LoRA": theirs,
        "S-LoRA without gate": replace(theirs, gate_steps=1),
    }
