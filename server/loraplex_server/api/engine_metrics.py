"""The engine's statistics as Prometheus metrics, read when somebody scrapes.

The `vllm:` names are what the Gateway API inference extension looks for by default; so its load-
and adapter-aware routing works here without configuration. `running_lora_adapters` are those in
the pool and ready to serve, `waiting_lora_adapters` those that requests wait for, as its model
server protocol asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraplex_server.api.adapter_names import AdapterNames
from loraplex_server.engine.handle import EngineHandle
from loraplex_server.engine.messages import EngineState, EngineStats

_Reader = Callable[[EngineStats], float]

_GAUGES: Final[tuple[tuple[str, str, _Reader], ...]] = (
    ("requests_running", "Sequences in the running batch.", lambda s: s.num_running),
    ("requests_waiting", "Sequences waiting for pages or an adapter.", lambda s: s.num_waiting),
    ("resident_adapters", "Adapters in the pool and ready to serve.", lambda s: len(s.resident)),
    ("host_adapters", "Adapters in host memory.", lambda s: len(s.host_adapters)),
    ("host_bytes", "Host memory that adapters take.", lambda s: s.host_bytes),
    ("host_capacity_bytes", "Host memory for adapters.", lambda s: s.host_capacity_bytes),
)
_COUNTERS: Final[tuple[tuple[str, str, _Reader], ...]] = (
    ("engine_steps", "Steps of the engine.", lambda s: s.num_steps),
    ("engine_step_seconds", "Time spent inside steps.", lambda s: s.step_s),
    ("preemptions", "Sequences that gave back their pages.", lambda s: s.num_preemptions),
    ("adapter_loads", "Adapters loaded into the pool.", lambda s: s.num_loads),
    ("adapter_load_seconds", "Time spent loading adapters.", lambda s: s.load_s),
    ("adapter_host_hits", "Loads that host memory served.", lambda s: s.num_host_hits),
    ("adapter_prefetches", "Adapters brought into host memory early.", lambda s: s.num_prefetches),
    ("adapter_load_failures", "Loads that failed.", lambda s: s.num_load_failures),
    ("adapter_evictions", "Adapters evicted from the pool.", lambda s: s.num_evictions),
    ("prefix_evictions", "Pages evicted from the prefix cache.", lambda s: s.num_prefix_evictions),
    (
        "prefix_hit_tokens",
        "Prompt tokens found in the prefix cache.",
        lambda s: s.prefix_hit_tokens,
    ),
    ("prefix_query_tokens", "Prompt tokens looked for in it.", lambda s: s.prefix_query_tokens),
    ("prompt_tokens", "Prompt tokens computed, recomputation included.", lambda s: s.prompt_tokens),
    ("generated_tokens", "Tokens generated.", lambda s: s.generated_tokens),
)


class EngineCollector(Collector):
    """Registered once per app; keeps nothing between scrapes.

    The engine's counters start again from zero when the engine process does, which Prometheus
    takes for what it is.
    """

    def __init__(self, engine: EngineHandle, names: AdapterNames, base_name: str) -> None:
        self._engine = engine
        self._names = names
        self._base_name = base_name

    def collect(self) -> Iterator[Metric]:
        """Yield every metric from one snapshot."""
        stats = self._engine.stats
        pages = GaugeMetricFamily("loraplex_pool_pages", "Pages of the pool.", labels=["use"])
        pages.add_metric(["kv"], stats.pages_kv)
        pages.add_metric(["prefix_used"], stats.pages_prefix_used)
        pages.add_metric(["prefix_idle"], stats.pages_prefix_idle)
        pages.add_metric(["adapters"], stats.pages_adapters)
        pages.add_metric(["free"], stats.pages_free)
        yield pages
        for name, text, read in _GAUGES:
            yield GaugeMetricFamily(f"loraplex_{name}", text, value=read(stats))
        for name, text, read in _COUNTERS:
            yield CounterMetricFamily(f"loraplex_{name}", text, value=read(stats))
        yield CounterMetricFamily(
            "loraplex_engine_restarts", "Engine deaths survived.", value=self._engine.num_restarts
        )
        is_ready = self._engine.state is EngineState.READY
        yield GaugeMetricFamily("loraplex_engine_ready", "1 when it serves.", value=is_ready)
        yield from self._gateway_metrics(stats)

    def _gateway_metrics(self, stats: EngineStats) -> Iterator[Metric]:
        gauges = {
            "vllm:num_requests_running": stats.num_running,
            "vllm:num_requests_waiting": stats.num_waiting,
            "vllm:kv_cache_usage_perc": kv_usage(stats),
        }
        counters = {
            "vllm:prefix_cache_queries": stats.prefix_query_tokens,
            "vllm:prefix_cache_hits": stats.prefix_hit_tokens,
        }
        for kind, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, value in values.items():
                family = kind(name, "As vLLM defines it.", labels=["model_name"])
                family.add_metric([self._base_name], value)
                yield family
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        adapters = GaugeMetricFamily(
            "vllm:lora_requests_info", "Adapters by state; the value is the time.", labels=labels
        )
        running = self._joined_names(stats.resident)
        waiting = self._joined_names({*stats.waiting_adapters, *stats.loading} - {*stats.resident})
        adapters.add_metric([str(adapter_room(stats)), running, waiting], time.time())
        yield adapters

    def _joined_names(self, adapter_ids: Iterable[str]) -> str:
        return ",".join(sorted(name for i in adapter_ids for name in self._names.of(i)))


def kv_usage(stats: EngineStats) -> float:
    """Return the share of pages in KV use among those that KV could have (0 to 1).

    What is evicted on demand counts as available: prefixes that no running sequence refers to, and
    adapters that none uses.
    """
    running = set(stats.running_adapters)
    idle_adapters = sum(pages for i, pages in stats.resident.items() if i not in running)
    in_use = stats.pages_kv + stats.pages_prefix_used
    room = in_use + stats.pages_prefix_idle + stats.pages_free + idle_adapters
    return in_use / room if room else 0.0


def adapter_room(stats: EngineStats) -> int:
    """Return how many adapters of the present mean size the pool could hold at once.

    Without ending anybody: prefixes that nobody refers to make room.
    """
    num_resident = len(stats.resident)
    mean_pages = max(1, sum(stats.resident.values()) // num_resident) if num_resident else 1
    return num_resident + (stats.pages_free + stats.pages_prefix_idle) // mean_pages
