"""S-LoRA's published throughputs on an A100-80G, simulated with its policies.

One factor on the roofline's times stands for all that its engine is slower than its device; it is
the same for every row, with or without adapters.
"""

from __future__ import annotations

from loraplex_server.simulator.experiments.options import Options
from loraplex_server.simulator.hardware import find_hardware
from loraplex_server.simulator.models import find_setting
from loraplex_server.simulator.report import Check, Report, Row, Table
from loraplex_server.simulator.setup import S_LORA_INEFFICIENCY, simulate, slora
from loraplex_server.simulator.suites import POOL_TOKENS, PUBLISHED, PublishedRow
from loraplex_server.simulator.workloads import slora_trace

#: The quickest one.
_QUICK_ROWS = slice(8, 9)


def run(options: Options) -> Report:
    """Simulate every published row and report how far off each is."""
    published = PUBLISHED[_QUICK_ROWS] if options.is_quick else PUBLISHED
    rows = [_row(row, options) for row in published]
    headers = (
        "table",
        "setting",
        "n",
        "R",
        "published req/s",
        "simulated",
        "error %",
        "TTFT s",
        "attainment",
        "loads",
    )
    worst = max(abs(float(row[6] or 0)) for row in rows)
    return Report(
        "validate",
        {
            "hardware": "a100-80g",
            "factor": S_LORA_INEFFICIENCY.factor,
            "overhead_s": S_LORA_INEFFICIENCY.overhead_s,
            "seed": options.seed,
        },
        [Table("S-LoRA on an A100-80G", headers, rows)],
        [Check("largest error of a row, %", worst, 15.0, is_at_most=True)],
    )


def _row(row: PublishedRow, options: Options) -> Row:
    options.tell(f"{row.table} {row.setting} n={row.num_adapters} R={row.rate:g}")
    trace = slora_trace(
        num_adapters=row.num_adapters,
        rate=row.rate,
        duration_s=row.duration_s,
        seed=options.seed,
    )
    setup = slora(
        find_setting(row.setting),
        find_hardware("a100-80g"),
        pool_tokens=POOL_TOKENS[row.setting],
    )
    summary = simulate(setup, trace).summary()
    error = 100 * (summary.throughput / row.requests_per_s - 1)
    return [
        row.table,
        row.setting,
        row.num_adapters,
        row.rate,
        row.requests_per_s,
        summary.throughput,
        error,
        summary.ttft_mean,
        summary.attainment,
        summary.num_loads,
    ]
