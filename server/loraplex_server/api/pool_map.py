"""The live map of the memory: who holds the pool's pages, and what the host keeps near."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loraplex_server.api.adapter_names import AdapterNames
from loraplex_server.engine.messages import EngineInfo, EngineStats


class Tiers:
    """How near adapters are, in one snapshot."""

    def __init__(self, stats: EngineStats) -> None:
        self._resident = stats.resident.keys()
        self._loading = frozenset(stats.loading)
        self._host = frozenset(stats.host_adapters)

    def of(self, adapter_id: str) -> str:
        """Return `resident`, `loading`, `host` or `disk`."""
        if adapter_id in self._resident:
            return "resident"
        if adapter_id in self._loading:
            return "loading"
        return "host" if adapter_id in self._host else "disk"


def pool_map(
    stats: EngineStats, info: EngineInfo, names: AdapterNames, base_name: str
) -> dict[str, Any]:
    """Return the map of one snapshot; the pages by use add up to `num_pages`."""
    return {
        "num_pages": info.num_pages,
        "page_bytes": info.page_bytes,
        "page_tokens": info.page_tokens,
        "kv": stats.pages_kv,
        "prefix_used": stats.pages_prefix_used,
        "prefix_idle": stats.pages_prefix_idle,
        "adapters": stats.pages_adapters,
        "free": stats.pages_free,
        "by_adapter": [*_holders(stats, names, base_name)],
        "host": {
            "bytes": stats.host_bytes,
            "capacity_bytes": stats.host_capacity_bytes,
            "adapters": [{"id": i, "name": _name(i, names)} for i in stats.host_adapters],
        },
    }


def _holders(stats: EngineStats, names: AdapterNames, base_name: str) -> Iterator[dict[str, Any]]:
    """Yield whoever has pages, the base model's prefixes first, then by most pages."""
    prefixes = dict(stats.prefix_pages_by_adapter)
    if base_pages := prefixes.pop("", 0):
        yield _holder(None, base_name, 0, base_pages, "resident")
    tiers = Tiers(stats)
    ids = {*stats.resident, *stats.loading, *prefixes}
    for i in sorted(ids, key=lambda i: (-stats.resident.get(i, 0) - prefixes.get(i, 0), i)):
        # Until a load is booked, nobody says how many of the adapters' pages are its own.
        weights = None if i in stats.loading else stats.resident.get(i, 0)
        yield _holder(i, _name(i, names), weights, prefixes.get(i, 0), tiers.of(i))


def _holder(
    adapter_id: str | None, name: str | None, weights: int | None, prefixes: int, state: str
) -> dict[str, Any]:
    return {
        "id": adapter_id,
        "name": name,
        "weight_pages": weights,
        "prefix_pages": prefixes,
        "state": state,
    }


def _name(adapter_id: str, names: AdapterNames) -> str | None:
    return next(iter(names.of(adapter_id)), None)
