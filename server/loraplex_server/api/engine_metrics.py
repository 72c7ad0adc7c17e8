"""The engine's statistics as Prometheus metrics, read when somebody scrapes.

The `vllm:` names are what the Gateway API inference extension looks for by default; so its load-
and adapter-aware routing works here without configuration. `running_lora_adapters` are those in
the pool and ready to serve, `waiting_lora_adapters` those that requests wait for, as its model
server protocol asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Final

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraplex_memory.accounts import EvictionCause
from loraplex_server.api.adapter_names import AdapterNames
from loraplex_server.api.families import Sample, family, histogram, single
from loraplex_server.engine.errors import EngineUnavailable
from loraplex_server.engine.handle import EngineHandle
from loraplex_server.engine.messages import TIERS, EngineState, EngineStats
from loraplex_server.engine.step_meter import StepParts
from loraplex_server.engine.tally import NO_COUNTS, TallyCounts

_Reader = Callable[[EngineStats], float]

#: Series without labels.
_PLAIN: Final[Mapping[str, _Reader]] = {
    "loraplex_requests_running": lambda s: s.num_running,
    "loraplex_requests_waiting": lambda s: s.num_waiting,
    "loraplex_resident_adapters": lambda s: len(s.resident),
    "loraplex_loading_adapters": lambda s: len(s.loading),
    "loraplex_running_adapters": lambda s: len(s.running_adapters),
    "loraplex_waiting_adapters": lambda s: len(s.waiting_adapters),
    "loraplex_host_adapters": lambda s: len(s.host_adapters),
    "loraplex_host_bytes": lambda s: s.host_bytes,
    "loraplex_host_capacity_bytes": lambda s: s.host_capacity_bytes,
    "loraplex_engine_steps": lambda s: s.num_steps,
    "loraplex_engine_step_seconds": lambda s: s.step_s,
    "loraplex_preemptions": lambda s: s.num_preemptions,
    "loraplex_adapter_loads": lambda s: s.num_loads,
    "loraplex_adapter_load_seconds": lambda s: s.load_s,
    "loraplex_adapter_host_hits": lambda s: s.num_host_hits,
    "loraplex_adapter_prefetches": lambda s: s.num_prefetches,
    "loraplex_adapter_load_failures": lambda s: s.num_load_failures,
    "loraplex_prefix_evictions": lambda s: s.num_prefix_evictions,
    "loraplex_prefix_hit_tokens": lambda s: s.prefix_hit_tokens,
    "loraplex_prefix_query_tokens": lambda s: s.prefix_query_tokens,
    "loraplex_prompt_tokens": lambda s: s.prompt_tokens,
    "loraplex_generated_tokens": lambda s: s.generated_tokens,
    "loraplex_fair_clients": lambda s: s.fair_clients,
    "loraplex_fair_service_spread": lambda s: s.fair_spread,
}

#: Series with one label, by its values.
_LABELLED: Final[Mapping[str, Callable[[EngineStats], Mapping[str, float]]]] = {
    "loraplex_pool_pages": lambda s: {
        "kv": s.pages_kv,
        "prefix_used": s.pages_prefix_used,
        "prefix_idle": s.pages_prefix_idle,
        "adapters": s.pages_adapters,
        "free": s.pages_free,
    },
    "loraplex_engine_step_part_seconds": lambda s: StepParts().by_name() | s.steps.part_s,
    "loraplex_step_tokens": lambda s: {
        "prefill": s.steps.prefill_tokens,
        "decode": s.steps.decode_tokens,
    },
    "loraplex_adapter_wants": lambda s: dict.fromkeys(TIERS, 0) | s.adapter_wants,
    "loraplex_adapter_evictions": lambda s: dict.fromkeys(EvictionCause, 0) | s.evictions_by_cause,
}

#: Of vLLM, with the base model's name as their only label.
_VLLM: Final[Mapping[str, _Reader]] = {
    "vllm:num_requests_running": lambda s: s.num_running,
    "vllm:num_requests_waiting": lambda s: s.num_waiting,
    "vllm:kv_cache_usage_perc": lambda s: kv_usage(s),
    "vllm:num_gpu_loaded_lora_adapters": lambda s: len(s.resident),
    "vllm:num_cpu_loaded_lora_adapters": lambda s: len(s.host_adapters),
    "vllm:max_gpu_lora_adapters": lambda s: adapter_room(s),
    "vllm:prefix_cache_queries": lambda s: s.prefix_query_tokens,
    "vllm:prefix_cache_hits": lambda s: s.prefix_hit_tokens,
    "vllm:num_preemptions": lambda s: s.num_preemptions,
    "vllm:generation_tokens": lambda s: s.generated_tokens,
}


class EngineCollector(Collector):
    """Registered once per app; keeps nothing between scrapes.

    The engine's counters start again from zero when the engine process does, which Prometheus
    takes for what it is.

    Args:
        is_shown: whether an adapter is among the busiest, which have series of their own.
    """

    def __init__(
        self,
        engine: EngineHandle,
        names: AdapterNames,
        base_name: str,
        is_shown: Callable[[str], bool],
    ) -> None:
        self._engine = engine
        self._names = names
        self._base_name = base_name
        self._is_shown = is_shown

    def collect(self) -> Iterator[Metric]:
        """Yield every metric from one snapshot."""
        stats = self._engine.stats
        for name, read in _PLAIN.items():
            yield single(name, read(stats))
        for name, read_all in _LABELLED.items():
            yield family(name, [((str(k),), v) for k, v in read_all(stats).items()])
        yield single("loraplex_engine_restarts", self._engine.num_restarts)
        yield single("loraplex_engine_ready", self._engine.state is EngineState.READY)
        yield from _histograms(stats, self._base_name)
        for name, read in _VLLM.items():
            yield family(name, [((self._base_name,), read(stats))])
        yield family("vllm:cache_config_info", self._cache_config())
        yield family("vllm:lora_requests_info", [self._lora_requests(stats)])
        yield family("vllm:lora_adapter_loaded", self._loaded(stats))

    def _cache_config(self) -> Iterator[Sample]:
        try:
            info = self._engine.info
        except EngineUnavailable:  # it has not been ready yet
            return
        yield (self._base_name, str(info.page_tokens), str(info.num_pages)), 1

    def _lora_requests(self, stats: EngineStats) -> Sample:
        wanted = {*stats.waiting_adapters, *stats.loading} - {*stats.resident}
        running, waiting = self._joined_names(stats.resident), self._joined_names(wanted)
        max_lora = takeable_adapters(stats, self._names.pinned)
        return (str(max_lora), running, waiting), time.time()

    def _loaded(self, stats: EngineStats) -> Iterator[Sample]:
        pinned = self._names.pinned
        shown: dict[tuple[str, ...], None] = {}  # two versions of a name can look the same
        for level, ids in (("gpu", stats.resident), ("cpu", stats.host_adapters)):
            for i in ids:
                for name, rank in self._names.ranks(i).items():
                    if self._is_shown(name):
                        shown[name, level, str(i in pinned).lower(), str(rank), "0"] = None
        for labels in shown:
            yield labels, 1

    def _joined_names(self, adapter_ids: Iterable[str]) -> str:
        # A name whose new version is on its way is not ready because its old one is there.
        return ",".join(sorted(name for i in adapter_ids for name in self._names.current_of(i)))


def _histograms(stats: EngineStats, base_name: str) -> Iterator[Metric]:
    steps, model = stats.steps, (base_name,)
    yield histogram("loraplex_engine_step_duration_seconds", [((), steps.seconds)])
    yield histogram("loraplex_step_sequences", [((), steps.sequences)])
    yield histogram("loraplex_step_adapters", [((), steps.adapters)])
    yield histogram("vllm:iteration_tokens_total", [(model, steps.tokens)])
    by_tier = {tier: stats.load_seconds.get(tier, NO_COUNTS) for tier in ("host", "disk")}
    yield histogram(
        "loraplex_adapter_load_duration_seconds", [((t,), c) for t, c in by_tier.items()]
    )
    yield histogram("vllm:lora_adapter_load_seconds", [(model, _sum(by_tier.values()))])


def _sum(tallies: Iterable[TallyCounts]) -> TallyCounts:
    """Add histograms of the same borders up; those without an observation may have no counts."""
    filled = [tally for tally in tallies if tally.counts]
    columns = zip(*(tally.counts for tally in filled), strict=True)
    return TallyCounts(tuple(map(sum, columns)), sum(tally.total for tally in filled))


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
    free_pages = stats.pages_free + stats.pages_prefix_idle
    return len(stats.resident) + free_pages // mean_adapter_pages(stats)


def mean_adapter_pages(stats: EngineStats) -> int:
    """Return the mean pages of an adapter in the pool, rounded down; 1 where there is none."""
    return max(1, sum(stats.resident.values()) // max(1, len(stats.resident)))


def takeable_adapters(stats: EngineStats, pinned: Collection[str]) -> int:
    """Return the adapters in the pool plus how many more could come without waiting for anybody.

    A router takes a replica for full once as many are running and waiting. A pool that has served
    for a while is full of adapters that nobody uses, and one of them gives way at once: it counts
    as room, unless it is pinned. So this can be more than `adapter_room`, which is what fits.
    """
    needed = {*stats.running_adapters, *stats.waiting_adapters, *pinned}
    idle_pages = sum(pages for i, pages in stats.resident.items() if i not in needed)
    room = stats.pages_free + stats.pages_prefix_idle + idle_pages
    return len(stats.resident) + room // mean_adapter_pages(stats)
