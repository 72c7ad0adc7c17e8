"""How many users hold each adapter's file, and which files go when the last one lets go."""

from __future__ import annotations

from collections import Counter


class AdapterHolds:
    """Counts only; owned by the catalogue and used under its lock."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._doomed: set[str] = set()

    def hold(self, adapter_id: str) -> None:
        self._counts[adapter_id] += 1

    def release(self, adapter_id: str) -> bool:
        """End one hold; returns whether the adapter is to be discarded now."""
        assert self._counts[adapter_id] > 0, f"{adapter_id} is not held"
        self._counts[adapter_id] -= 1
        return self._is_over(adapter_id)

    def doom(self, adapter_id: str) -> bool:
        """No name refers to it any more; returns whether it is to be discarded now."""
        self._doomed.add(adapter_id)
        return self._is_over(adapter_id)

    def spare(self, adapter_id: str) -> None:
        """A name refers to it again."""
        self._doomed.discard(adapter_id)

    def num_held(self, adapter_id: str) -> int:
        return self._counts[adapter_id]

    def _is_over(self, adapter_id: str) -> bool:
        if self._counts[adapter_id] > 0:
            return False
        del self._counts[adapter_id]
        if adapter_id not in self._doomed:
            return False
        self._doomed.discard(adapter_id)
        return True
