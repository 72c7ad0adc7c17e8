"""What the adapters that the engine knows by id are called by those who ask for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_MAX_IDS: Final = 65536


class AdapterNames:
    """Names by adapter id, as requests have used them; for people and routers to read.

    Only a request brings an adapter into the pool, so every resident one is here.

    Attributes:
        pinned: ids of the adapters that are pinned, as `Upkeep` told the engine last.
    """

    def __init__(self) -> None:
        self._names: dict[str, dict[str, int]] = {}
        self.pinned: frozenset[str] = frozenset()

    def remember(self, adapter_id: str, name: str, rank: int) -> None:
        """A request resolved `name` to `adapter_id`, whose largest rank is `rank`."""
        self._names.setdefault(adapter_id, {})[name] = rank
        if len(self._names) > _MAX_IDS:
            del self._names[next(iter(self._names))]

    def forget(self, adapter_id: str, name: str) -> None:
        """`name` no longer stands for `adapter_id`."""
        names = self._names.get(adapter_id, {})
        names.pop(name, None)
        if not names:
            self._names.pop(adapter_id, None)

    def of(self, adapter_id: str) -> tuple[str, ...]:
        """Return the names of an adapter; none if it has been deleted."""
        return tuple(self._names.get(adapter_id, ()))

    def ranks(self, adapter_id: str) -> Mapping[str, int]:
        """Return the names of an adapter, each with the adapter's largest rank."""
        return self._names.get(adapter_id, {})
