"""No cliff when the adapters in use outgrow the pool: the same load on ever more adapters.

Llama-3-8B on an A100-40G, adapters of rank 16 asked for evenly, whose sum passes what fits beside
the KV cache of the requests that run.
"""

from __future__ import annotations

from dataclasses import replace

from loraplex_scheduler.policies import PolicyChoice
from loraplex_server.simulator.experiments.options import Options
from loraplex_server.simulator.hardware import find_hardware
from loraplex_server.simulator.models import find_setting
from loraplex_server.simulator.plots import panels_figure
from loraplex_server.simulator.report import Check, Report, Row, Table
from loraplex_server.simulator.setup import (
    A100_STEP_TOKENS,
    S_LORA_INEFFICIENCY,
    EngineSetup,
    make_parts,
    ours,
    simulate,
    slora,
)
from loraplex_server.simulator.workloads import zipf_trace

_RATE = 8.0
_HEADERS = ("engine", "working set", "n", "TTFT p50", "TTFT p99", "TPOT p99", "hits", "loads")
#: Adapters in shares of those that would fill the pool alone.
_SETS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)


def run(options: Options) -> Report:
    """Grow the working set and compare with all resident."""
    duration_s = 8.0 if options.is_quick else 240.0
    engines = _engines()
    num_fitting = _num_fitting(engines["ours"])
    rows: list[Row] = []
    median: dict[str, tuple[tuple[float, ...], list[float]]] = {}
    tail: dict[str, tuple[tuple[float, ...], list[float]]] = {}
    for name, engine in engines.items():
        median[name], tail[name] = (_SETS, []), (_SETS, [])
        for share in _SETS:
            num_adapters = max(1, round(share * num_fitting))
            options.tell(f"{name}: {num_adapters} adapters")
            trace = zipf_trace(
                num_adapters=num_adapters,
                rate=_RATE,
                duration_s=duration_s,
                zipf_s=0.0,
                seed=options.seed,
            )
            s = simulate(engine, trace).summary()
            median[name][1].append(s.ttft_p50)
            tail[name][1].append(s.ttft_p99)
            rows.append(
                [
                    name,
                    share,
                    num_adapters,
                    s.ttft_p50,
                    s.ttft_p99,
                    s.tpot_p99,
                    s.adapter_hit_rate,
                    s.num_loads,
                ]
            )
    all_resident, twice = median["ours"][1][0], median["ours"][1][_SETS.index(2.0)]
    parameters = {
        "model": "llama-3-8b",
        "hardware": "a100-40g",
        "rate": _RATE,
        "duration_s": duration_s,
        "factor": S_LORA_INEFFICIENCY.factor,
        "seed": options.seed,
    }
    panels = [("median TTFT", "s", median), ("P99 TTFT", "s", tail)]
    plot = panels_figure(panels, x_label="working set / pool")
    return Report(
        "thrash",
        parameters,
        [Table("Adapters asked for evenly", _HEADERS, rows)],
        [Check("ours, TTFT p50: twice the pool / all resident", twice / all_resident, 2.0, True)],
        {"thrash.svg": plot},
    )


def _num_fitting(setup: EngineSetup) -> int:
    """Return how many adapters would fill the pool alone."""
    parts = make_parts(setup)
    return setup.num_pages // parts.pages_of(setup.adapters.layer_ranks(0, setup.num_layers))


def _engines() -> dict[str, EngineSetup]:
    setting, hardware = find_setting("8B"), find_hardware("a100-40g")
    mine = ours(
        setting,
        hardware,
        inefficiency=S_LORA_INEFFICIENCY,
        max_step_tokens=A100_STEP_TOKENS,
        policy=PolicyChoice(order="fcfs", overload="none"),
    )
    lru = PolicyChoice(order="fcfs", overload="none", eviction="lru")
    return {
        "ours": mine,
        "ours, LRU": replace(mine, policy=lru),
        "S-LoRA": slora(setting, hardware),
    }
