"""How many users hold each adapter's file, under which name, and who waits for them to let go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field


@dataclass(eq=False)
class Drain:
    """Somebody waits until nobody uses an adapter by a name any more, or at all.

    Attributes:
        name: by which it was deleted.
        is_last: no other name stands for the adapter: its file goes too.
        is_over: the name stands for the adapter again, so there is nothing to wait for.
        freed: of the file, in bytes, when all is done; 0 where the adapter lives on.
    """

    adapter_id: str
    name: str
    is_last: bool
    is_over: bool = False
    freed: Future[int] = field(default_factory=Future)


class AdapterHolds:
    """Counts only; owned by the catalogue's store and used under its lock."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._by_name: Counter[tuple[str, str | None]] = Counter()
        self._doomed: set[str] = set()
        self._drains: dict[str, list[Drain]] = {}

    def hold(self, adapter_id: str, name: str | None = None) -> None:
        """Begin a hold by a user who asked for `name`; None: by nobody's request."""
        self._counts[adapter_id] += 1
        self._by_name[adapter_id, name] += 1

    def release(self, adapter_id: str, name: str | None = None) -> bool:
        """End one hold; returns whether the adapter is to be discarded now."""
        assert self._by_name[adapter_id, name] > 0, f"{adapter_id} is not held"
        self._counts[adapter_id] -= 1
        self._by_name[adapter_id, name] -= 1
        if not self._by_name[adapter_id, name]:
            del self._by_name[adapter_id, name]
        return self._is_over(adapter_id)

    def doom(self, adapter_id: str) -> bool:
        """No name refers to it any more; returns whether it is to be discarded now."""
        self._doomed.add(adapter_id)
        return self._is_over(adapter_id)

    def spare(self, adapter_id: str) -> None:
        """A name refers to it again."""
        self._doomed.discard(adapter_id)
        for drain in self._drains.get(adapter_id, ()):
            drain.is_last = False

    def take_over(self, adapter_id: str, name: str) -> None:
        """The name stands for the adapter again: whose users are whose, nobody can tell now."""
        for drain in self._drains.get(adapter_id, ()):
            drain.is_over = drain.is_over or drain.name == name

    def num_held(self, adapter_id: str) -> int:
        return self._counts[adapter_id]

    def num_held_by(self, adapter_id: str, name: str) -> int:
        """Return how many hold it who asked for `name`."""
        return self._by_name[adapter_id, name]

    def wait(self, drain: Drain) -> None:
        """Remember who waits."""
        self._drains.setdefault(drain.adapter_id, []).append(drain)

    def take_drained(self, adapter_id: str, *, is_gone: bool) -> list[Drain]:
        """Return those who need not wait any more; their futures are the caller's to resolve."""
        drains = self._drains.pop(adapter_id, [])
        done = [drain for drain in drains if is_gone or self._is_drained(drain)]
        if len(done) < len(drains):
            self._drains[adapter_id] = [drain for drain in drains if drain not in done]
        return done

    def names_in_use(self) -> Iterator[str]:
        """Yield names by which anything is held."""
        for _, name in self._by_name:
            if name is not None:
                yield name

    def _is_drained(self, drain: Drain) -> bool:
        is_used = self._by_name[drain.adapter_id, drain.name] > 0
        return drain.is_over or not (drain.is_last or is_used)

    def _is_over(self, adapter_id: str) -> bool:
        if self._counts[adapter_id] > 0:
            return False
        del self._counts[adapter_id]
        if adapter_id not in self._doomed:
            return False
        self._doomed.discard(adapter_id)
        return True
