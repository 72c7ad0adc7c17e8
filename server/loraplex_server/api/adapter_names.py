"""What the adapters that the engine knows by id are called by those who ask for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from loraplex_server.adapters.record import AdapterRecord

_MAX_IDS: Final = 65536


class AdapterNames:
    """Names by adapter id, as requests have used them; for people and routers to read.

    Only a request brings an adapter into the pool, so every resident one is here.

    Attributes:
        pinned: ids of the adapters that are pinned, as `Upkeep` told the engine last.
    """

    def __init__(self) -> None:
        self._names: dict[str, dict[str, int]] = {}
        self._current_ids: dict[str, str] = {}
        self.pinned: frozenset[str] = frozenset()

    def remember(self, record: AdapterRecord) -> None:
        """A request was resolved to this version of a name."""
        self._names.setdefault(record.id, {})[record.name] = record.rank_max
        if record.is_current:
            self._current_ids[record.name] = record.id
        if len(self._names) > _MAX_IDS:
            oldest = next(iter(self._names))
            for name in (*self._names[oldest],):
                self.forget(oldest, name)

    def forget(self, adapter_id: str, name: str) -> None:
        """`name` no longer stands for `adapter_id`."""
        names = self._names.get(adapter_id, {})
        names.pop(name, None)
        if self._current_ids.get(name) == adapter_id:
            del self._current_ids[name]
        if not names:
            self._names.pop(adapter_id, None)

    def of(self, adapter_id: str) -> tuple[str, ...]:
        """Return the names of an adapter; none if it has been deleted."""
        return tuple(self._names.get(adapter_id, ()))

    def current_of(self, adapter_id: str) -> tuple[str, ...]:
        """Return the names that alone, without a version, last stood for an adapter."""
        return tuple(n for n in self.of(adapter_id) if self._current_ids.get(n) == adapter_id)

    def ranks(self, adapter_id: str) -> Mapping[str, int]:
        """Return the names of an adapter, each with the adapter's largest rank."""
        return self._names.get(adapter_id, {})
