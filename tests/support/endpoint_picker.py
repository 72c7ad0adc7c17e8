"""An endpoint picker that reads metrics and scores replicas as that of llm-d does.

Written after the rules of github.com/llm-d/llm-d-router, in `pkg/epp/framework/plugins`:

- `datalayer/extractor/metrics/extractor.go`: which series become which attribute of an endpoint,
  and how the labels of the adapters' one are read;
- `datalayer/extractor/metrics/{spec,loraspec}.go`: of several series of one family the latest is
  read, by timestamp, or by *value* for the adapters' one;
- `scheduling/scorer/{loraaffinity,queuedepth,kvcacheutilization}`: scores between 0 and 1, of which
  the profile's weighted sum decides (`scheduling/picker/maxscore`).

The scorer of prefixes is left out: it goes by what the picker itself has sent where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


@dataclass(frozen=True)
class Endpoint:
    """What the picker knows of one replica."""

    num_waiting: int
    num_running: int
    kv_usage: float
    active: frozenset[str] = field(default_factory=frozenset)
    waiting: frozenset[str] = field(default_factory=frozenset)
    max_active: int = 0
    block_size: int = 0
    num_blocks: int = 0


class Picker:
    """Reads the `EndpointPickerConfig` of docker/gateway; knows the series only from there."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        plugins = {plugin["type"]: plugin.get("parameters", {}) for plugin in config["plugins"]}
        extractor = plugins["core-metrics-extractor"]
        engines = {engine["name"]: engine for engine in extractor["engineConfigs"]}
        self._engine = engines[extractor["defaultEngine"]]
        (profile,) = config["schedulingProfiles"]
        weights = {plugin["pluginRef"]: plugin.get("weight") for plugin in profile["plugins"]}
        self.weights = {name: weights[name] for name in _SCORERS}

    def endpoint(self, text: str) -> Endpoint:
        """Read the metrics of a replica; raises ValueError where a needed series is missing."""
        families = {f.name: f for f in text_string_to_metric_families(text)}

        def latest(spec: str, key: Callable[[Sample], float]) -> Sample:
            samples = families[self._engine[spec]].samples if self._engine[spec] in families else ()
            if not samples:
                raise ValueError(f"metric family {self._engine[spec]!r} not found")
            return max(samples, key=key)

        def value(spec: str) -> float:
            return latest(spec, lambda sample: float(sample.timestamp or 0)).value

        lora = latest("loraSpec", lambda sample: sample.value).labels
        cache = latest("cacheInfoSpec", lambda sample: float(sample.timestamp or 0)).labels
        return Endpoint(
            int(value("queuedRequestsSpec")),
            int(value("runningRequestsSpec")),
            value("kvUsageSpec"),
            _adapters(lora["running_lora_adapters"]),
            _adapters(lora["waiting_lora_adapters"]),
            int(lora["max_lora"]),
            int(cache["block_size"]),
            int(cache["num_gpu_blocks"]),
        )

    def scores(self, model: str, endpoints: Sequence[Endpoint]) -> list[float]:
        """Return the weighted sum of scores of each endpoint, for a request of that model."""
        totals = [0.0] * len(endpoints)
        for name, scorer in _SCORERS.items():
            for i, score in enumerate(scorer(model, endpoints)):
                totals[i] += self.weights[name] * min(1.0, max(0.0, score))
        return totals


def _adapters(joined: str) -> frozenset[str]:
    return frozenset(name.strip() for name in joined.split(",") if name.strip())


def lora_affinity(model: str, endpoints: Sequence[Endpoint]) -> list[float]:
    """Return 1 where it is ready, 0.8 where there is room, 0.6 where it is waited for, else 0."""

    def score(endpoint: Endpoint) -> float:
        if model in endpoint.active:
            return 1.0
        if len(endpoint.active) + len(endpoint.waiting) < endpoint.max_active:
            return 0.8
        return 0.6 if model in endpoint.waiting else 0.0

    return [score(endpoint) for endpoint in endpoints]


def queue_depth(model: str, endpoints: Sequence[Endpoint]) -> list[float]:
    """Return 1 for the shortest queue and 0 for the longest; 1 for all if they are equal."""
    lengths = [endpoint.num_waiting for endpoint in endpoints]
    low, high = min(lengths), max(lengths)
    return [1.0 if low == high else (high - n) / (high - low) for n in lengths]


def kv_room(model: str, endpoints: Sequence[Endpoint]) -> list[float]:
    """Return the share of pages that are free for keys and values."""
    return [1.0 - endpoint.kv_usage for endpoint in endpoints]


_SCORERS: Mapping[str, Callable[[str, Sequence[Endpoint]], list[float]]] = {
    "lora-affinity-scorer": lora_affinity,
    "queue-scorer": queue_depth,
    "kv-cache-utilization-scorer": kv_room,
}
