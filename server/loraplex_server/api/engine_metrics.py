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
)
_COUNTERS: Final[tuple[tuple[str, str, _Reader], ...]] = (
    ("engine_steps", "Steps of the engine.", lambda s: s.num_steps),
    ("engine_step_seconds", "Time spent inside steps.", lambda s: s.step_s),
    ("preemptions", "Sequences that gave back their pages.", lambda s: s.num_preemptions),
    ("adapter_loads", "Adapters loaded into the pool.", lambda s: s.num_loads),
    ("adapter_load_failures", "Loads that failed.", lambda s: s.num_load_failures),
    ("adapter_evictions", "Adapters evicted from the pool.", lambda s: s.num_evictions),
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
        values = {
            "vllm:num_requests_running": stats.num_running,
            "vllm:num_requests_waiting": stats.num_waiting,
            "vllm:kv_cache_usage_perc": kv_usage(stats),
        }
        for name, value in values.items():
            gauge = GaugeMetricFamily(name, "As vLLM defines it.", labels=["model_name"])
            gauge.add_metric([self._base_name], value)
            yield gauge
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

    Adapters that no running sequence uses count as available: they are evicted on demand.
    """
    in_use = set(stats.running_adapters)
    idle = sum(pages for i, pages in stats.resident.items() if i not in in_use)
    available = stats.pages_kv + stats.pages_free + idle
    return stats.pages_kv / available if available else 0.0


def adapter_room(stats: EngineStats) -> int:
    """Return how many adapters of the present mean size the pool could hold at once."""
    num_resident = len(stats.resident)
    mean_pages = max(1, sum(stats.resident.values()) // num_resident) if num_resident else 1
    return num_resident + stats.pages_free // mean_pages
