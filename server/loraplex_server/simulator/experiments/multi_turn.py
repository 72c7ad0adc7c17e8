"""What the prefix cache is worth to conversations: capacity with it and without.

Chats of five turns on average over 100 adapters with a system prompt each, Llama-3-8B on an A100.
Capacity is the largest steady throughput over a sweep of loads.
"""

from __future__ import annotations

from loraplex_scheduler.policies import PolicyChoice
from loraplex_server.simulator.experiments.options import Options
from loraplex_server.simulator.hardware import find_hardware
from loraplex_server.simulator.models import find_setting
from loraplex_server.simulator.plots import panels_figure
from loraplex_server.simulator.report import Check, Report, Row, Table
from loraplex_server.simulator.setup import (
    A100_STEP_TOKENS,
    S_LORA_INEFFICIENCY,
    ours,
    simulate,
)
from loraplex_server.simulator.workloads import multi_turn_trace

_NUM_ADAPTERS = 100
_HEADERS = ("prefix cache", "R", "answers/s", "TTFT p50", "TTFT p99", "hit rate", "preemptions")


def run(options: Options) -> Report:
    """Sweep the load with and without the cache."""
    rates = (40.0, 80.0) if options.is_quick else (10.0, 20.0, 40.0, 60.0, 80.0, 100.0, 150.0)
    duration_s = 5.0 if options.is_quick else 60.0
    rows: list[Row] = []
    steady: dict[str, tuple[tuple[float, ...], list[float]]] = {}
    median: dict[str, tuple[tuple[float, ...], list[float]]] = {}
    for has_cache, name in ((True, "on"), (False, "off")):
        steady[name], median[name] = (rates, []), (rates, [])
        setup = ours(
            find_setting("8B"),
            find_hardware("a100-80g"),
            inefficiency=S_LORA_INEFFICIENCY,
            max_step_tokens=A100_STEP_TOKENS,
            policy=PolicyChoice(order="fcfs", overload="none", has_prefix_cache=has_cache),
        )
        for rate in rates:
            options.tell(f"prefix cache {name}, R={rate:g}")
            trace = multi_turn_trace(
                rate=rate, duration_s=duration_s, num_adapters=_NUM_ADAPTERS, seed=options.seed
            )
            s = simulate(setup, trace).summary()
            steady[name][1].append(s.steady_throughput)
            median[name][1].append(s.ttft_p50)
            rows.append(
                [
                    name,
                    rate,
                    s.steady_throughput,
                    s.ttft_p50,
                    s.ttft_p99,
                    s.prefix_hit_rate,
                    s.num_preemptions,
                ]
            )
    gain = max(steady["on"][1]) / max(steady["off"][1])
    parameters = {
        "model": "llama-3-8b",
        "hardware": "a100-80g",
        "adapters": _NUM_ADAPTERS,
        "duration_s": duration_s,
        "factor": S_LORA_INEFFICIENCY.factor,
        "seed": options.seed,
    }
    panels = [("throughput", "answers per second", steady), ("median TTFT", "s", median)]
    plot = panels_figure(panels, x_label="requests per second", is_log_x=False)
    return Report(
        "multi-turn",
        parameters,
        [Table("Conversations by load", _HEADERS, rows)],
        [Check("capacity with prefix cache / without", gain, 1.4)],
        {"multi-turn.svg": plot},
    )
