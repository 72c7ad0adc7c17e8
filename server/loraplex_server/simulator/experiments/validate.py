"""S-LoRA's published throughputs, simulated with its policies.

One factor on the roofline's times stands for all that its engine is slower than its device: one on
A100s and one on the A10G, each the same for every setting and number of adapters, and for none. The
A100's was chosen on the 80 GB rows, so the 40 GB rows are a test of it.
"""

from __future__ import annotations

from loraplex_server.simulator.experiments.options import Options
from loraplex_server.simulator.hardware import find_hardware
from loraplex_server.simulator.models import find_setting
from loraplex_server.simulator.report import Check, Report, Row, Table
from loraplex_server.simulator.setup import (
    S_LORA_INEFFICIENCY,
    S_LORA_ON_A10G,
    simulate,
    slora,
)
from loraplex_server.simulator.suites import PUBLISHED, PublishedRow
from loraplex_server.simulator.workloads import slora_trace

#: The quickest one.
_QUICK_ROWS = slice(8, 9)
_MOST_ERROR_PERCENT = 15.0
_HEADERS = (
    "table",
    "hardware",
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


def run(options: Options) -> Report:
    """Simulate every published row and report how far off each is."""
    published = PUBLISHED[_QUICK_ROWS] if options.is_quick else PUBLISHED
    rows = [_row(row, options) for row in published]
    worst = {
        hardware: max(abs(float(row[7] or 0)) for row in rows if row[1] == hardware)
        for hardware in dict.fromkeys(row.hardware for row in published)
    }
    return Report(
        "validate",
        {
            "factor on A100": S_LORA_INEFFICIENCY.factor,
            "factor on A10G": S_LORA_ON_A10G.factor,
            "seed": options.seed,
        },
        [Table("S-LoRA, published and simulated", _HEADERS, rows)],
        [
            Check(f"{hardware}: largest error, %", error, _MOST_ERROR_PERCENT, is_at_most=True)
            for hardware, error in worst.items()
        ],
    )


def _row(row: PublishedRow, options: Options) -> Row:
    options.tell(f"{row.table} {row.hardware} {row.setting} n={row.num_adapters} R={row.rate:g}")
    trace = slora_trace(
        num_adapters=row.num_adapters,
        rate=row.rate,
        duration_s=row.duration_s,
        seed=options.seed,
    )
    setup = slora(
        find_setting(row.setting),
        find_hardware(row.hardware),
        pool_tokens=row.pool_tokens,
        inefficiency=S_LORA_ON_A10G if row.hardware == "a10g" else S_LORA_INEFFICIENCY,
    )
    summary = simulate(setup, trace).summary()
    return [
        row.table,
        row.hardware,
        row.setting,
        row.num_adapters,
        row.rate,
        row.requests_per_s,
        summary.throughput,
        100 * (summary.throughput / row.requests_per_s - 1),
        summary.ttft_mean,
        summary.attainment,
        summary.num_loads,
    ]
