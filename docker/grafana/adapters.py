"""Which adapters are used, where they are, and what bringing them in costs."""

from __future__ import annotations

from typing import Final

from by_name import by_name
from dashboard import Dashboard, Panel, Query, Variable
from queries import INSTANCE, MODEL, OF_INSTANCE, OF_MODEL, one, quantiles, total

_ADAPTER: Final = Variable("adapter", "adapter", "loraplex_adapter_requests_total")
_A: Final = OF_INSTANCE + ', adapter=~"$adapter"'

ADAPTERS: Final = Dashboard(
    "loraplex-adapters",
    "loraplex / adapters",
    "Which adapters are used, where they are, and what bringing them in costs.",
    (INSTANCE, MODEL, _ADAPTER),
    (
        ("By adapter", by_name("adapter", _A)),
        (
            "Tiers",
            (
                Panel(
                    "Where they are",
                    "Adapters in the pool, on their way, and in host memory.",
                    "short",
                    (
                        Query(f"sum(loraplex_resident_adapters{{{OF_INSTANCE}}})", "pool"),
                        Query(f"sum(loraplex_loading_adapters{{{OF_INSTANCE}}})", "loading"),
                        Query(f"sum(loraplex_host_adapters{{{OF_INSTANCE}}})", "host"),
                    ),
                ),
                Panel(
                    "Where requests find theirs",
                    "host costs milliseconds, disk up to seconds.",
                    "reqps",
                    one(total("loraplex_adapter_wants_total", "tier"), "{{tier}}"),
                    is_stacked=True,
                ),
                Panel(
                    "Found in the pool",
                    "Share of requests, 5 minutes. Low together with evictions is thrashing.",
                    "percentunit",
                    one(f"loraplex:adapter_pool_hit_ratio:rate5m{{{OF_INSTANCE}}}", "{{instance}}"),
                ),
                Panel(
                    "Load time (p95)",
                    "Of one load into the pool, by where it came from, without queueing.",
                    "s",
                    one(
                        "histogram_quantile(0.95, "
                        + total("loraplex_adapter_load_duration_seconds_bucket", "tier, le")
                        + ")",
                        "{{tier}}",
                    ),
                    (0.5, 2),
                ),
                Panel(
                    "Waiting for an adapter (p95)",
                    "What requests with an adapter wait for nothing else than it.",
                    "s",
                    quantiles("loraplex_request_adapter_wait_seconds")[1:2],
                    (0.5, 2),
                ),
                Panel(
                    "Loads, prefetches, failures",
                    "A failure fails the requests that want the adapter: the log names it.",
                    "reqps",
                    (
                        Query(total("loraplex_adapter_loads_total"), "loads"),
                        Query(total("loraplex_adapter_prefetches_total"), "prefetches"),
                        Query(total("loraplex_adapter_load_failures_total"), "failures"),
                    ),
                ),
                Panel(
                    "Evictions by cause",
                    "kv: sequences took the pages. adapter: another adapter. unused: by policy.",
                    "reqps",
                    one(total("loraplex_adapter_evictions_total", "cause"), "{{cause}}"),
                    is_stacked=True,
                ),
                Panel(
                    "Distinct adapters of a step",
                    "How mixed the batch is.",
                    "short",
                    quantiles("loraplex_step_adapters"),
                ),
                Panel(
                    "Room",
                    "Adapters of the present mean size that the pool can hold, and those in use.",
                    "short",
                    (
                        Query(f"sum(vllm:max_gpu_lora_adapters{{{OF_MODEL}}})", "room"),
                        Query(f"sum(loraplex_running_adapters{{{OF_INSTANCE}}})", "running"),
                        Query(f"sum(loraplex_waiting_adapters{{{OF_INSTANCE}}})", "waited for"),
                    ),
                ),
            ),
        ),
        (
            "Busiest adapters",
            (
                Panel(
                    "Loaded",
                    "The busiest adapters that are in the pool (gpu) or in host memory (cpu).",
                    "short",
                    one(
                        "sum by (adapter_name, level, rank, pinned) "
                        f'(vllm:lora_adapter_loaded{{{OF_INSTANCE}, adapter_name=~"$adapter"}})'
                    ),
                    kind="table",
                    width=24,
                ),
            ),
        ),
    ),
)
