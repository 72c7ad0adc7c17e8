"""How fast the simulator is: one hour of 10 requests per second over 2000 adapters."""

from __future__ import annotations

from loraplex_server.simulator.experiments.options import Options
from loraplex_server.simulator.hardware import find_hardware
from loraplex_server.simulator.models import find_setting
from loraplex_server.simulator.report import Check, Report, Row, Table
from loraplex_server.simulator.setup import A100_STEP_TOKENS, ours, simulate
from loraplex_server.simulator.workloads import zipf_trace

_NUM_ADAPTERS = 2000
_RATE = 10.0
_MOST_WALL_S = 300.0


def run(options: Options) -> Report:
    """Simulate the hour and time it."""
    duration_s = 20.0 if options.is_quick else 3600.0
    trace = zipf_trace(
        num_adapters=_NUM_ADAPTERS, rate=_RATE, duration_s=duration_s, seed=options.seed
    )
    setup = ours(find_setting("S1"), find_hardware("a100-80g"), max_step_tokens=A100_STEP_TOKENS)
    options.tell(f"{len(trace)} requests")
    outcome = simulate(setup, trace)
    summary, num_steps = outcome.summary(), outcome.counters.num_steps
    rows: list[Row] = [
        ["requests", len(trace)],
        ["steps", num_steps],
        ["simulated s", summary.duration_s],
        ["wall s", outcome.wall_s],
        ["wall us per step", 1e6 * outcome.wall_s / num_steps],
        ["wall us per token", 1e6 * outcome.wall_s / float(trace.output_len.sum())],
        ["throughput, req/s", summary.throughput],
        ["TTFT p50, s", summary.ttft_p50],
        ["TTFT p99, s", summary.ttft_p99],
        ["adapter hit rate", summary.adapter_hit_rate],
    ]
    most_s = _MOST_WALL_S * duration_s / 3600.0
    return Report(
        "hour",
        {
            "setting": "S1",
            "hardware": "a100-80g",
            "adapters": _NUM_ADAPTERS,
            "rate": _RATE,
            "duration_s": duration_s,
            "seed": options.seed,
        },
        [Table("One simulated hour", ("what", "value"), rows)],
        [Check("wall time, s", outcome.wall_s, most_s, is_at_most=True)],
    )
