"""Fair sharing between tenants: VTC against first come, first served, on VTC's workloads.

As in its evaluation: Llama-7B on an A10G, a pool of 10,000 tokens, an adapter of rank 8 per client.
The engine is the same and so is its inefficiency; only the order of service differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from loraplex_scheduler.policies import PolicyChoice
from loraplex_server.simulator.experiments.options import Options
from loraplex_server.simulator.fairness import service_gap
from loraplex_server.simulator.hardware import find_hardware
from loraplex_server.simulator.lmsys import VTC_LENGTHS, matched_trace
from loraplex_server.simulator.models import find_setting
from loraplex_server.simulator.plots import gap_figure
from loraplex_server.simulator.report import Check, Report, Row, Table
from loraplex_server.simulator.setup import S_LORA_ON_A10G, EngineSetup, ours, simulate
from loraplex_server.simulator.trace import Trace
from loraplex_server.simulator.workloads import vtc_trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POOL_TOKENS = 10_000
_ORDERS = ("fcfs", "vtc")


def workloads(options: Options) -> dict[str, Trace]:
    """Return VTC's workloads by name."""
    minutes = 1 if options.is_quick else 6
    seed = options.seed
    span_s = 60.0 * minutes
    eight = (0.4,) * 3 + (0.6,) * 5
    traces = {
        "two clients, 90 and 180 per min": vtc_trace(rates=(1.5, 3.0), duration_s=span_s),
        "eight clients, 24 to 36 per min": vtc_trace(rates=eight, duration_s=span_s),
        "on and off every 60 s": vtc_trace(rates=(2.0, 3.0), duration_s=span_s, on_off_s=60.0),
        "Poisson, 90 and 180 per min": vtc_trace(
            rates=(1.5, 3.0), duration_s=span_s, is_poisson=True, seed=seed
        ),
        "LMSYS-like, 210 per min": matched_trace(
            rate=3.5, duration_s=600.0, lengths=VTC_LENGTHS, seed=seed
        ),
    }
    return dict(list(traces.items())[:1]) if options.is_quick else traces


def run(options: Options) -> Report:
    """Measure gap and throughput of each workload under both orders."""
    rows: list[Row] = []
    checks = []
    plots: dict[str, Callable[[], Figure]] = {}
    for name, trace in workloads(options).items():
        gaps, rates = {}, {}
        for order in _ORDERS:
            options.tell(f"{name}: {order}")
            outcome = simulate(_setup(order), trace)
            gaps[order], summary = service_gap(outcome), outcome.summary()
            rates[order] = summary.tokens_per_s
            rows.append(
                [
                    name,
                    order,
                    gaps[order].most,
                    gaps[order].mean,
                    gaps[order].most_accumulated,
                    summary.tokens_per_s,
                    summary.ttft_p50,
                    summary.ttft_p99,
                ]
            )
        checks += [
            Check(
                f"{name}: VTC's largest gap / FCFS's",
                gaps["vtc"].most / gaps["fcfs"].most,
                0.5,
                is_at_most=True,
            ),
            Check(f"{name}: VTC's throughput / FCFS's", rates["vtc"] / rates["fcfs"], 0.995),
        ]
        if not plots:
            plots["fairness.svg"] = gap_figure(name, dict(gaps))
    headers = (
        "workload",
        "order",
        "max gap",
        "mean gap",
        "max accumulated",
        "tokens/s",
        "TTFT p50",
        "TTFT p99",
    )
    parameters = {
        "model": "llama-7b",
        "hardware": "a10g",
        "pool_tokens": _POOL_TOKENS,
        "factor": S_LORA_ON_A10G.factor,
        "seed": options.seed,
    }
    title = "Service gap (VTC's definition, tokens/s) and throughput"
    return Report("fairness", parameters, [Table(title, headers, rows)], checks, plots)


def _setup(order: str) -> EngineSetup:
    setup = ours(
        find_setting("S1"),
        find_hardware("a10g"),
        pool_tokens=_POOL_TOKENS,
        inefficiency=S_LORA_ON_A10G,
    )
    return replace(setup, policy=PolicyChoice(order=order))
