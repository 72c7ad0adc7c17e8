"""What to bring closer before anybody is held up by it: an idle link is used for guesses.

Three sources, surest first: requests that wait behind those a step could admit, hints
(`POST /v1/adapters/{name}/prefetch`), and the adapters asked for most lately. The first two come
into host memory; all may come into the pool, but only into pages that are free and that nobody who
runs could come to need, so that a guess costs nobody anything.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Collection, Iterable
from typing import Final

from loraplex_memory.accounts import PoolAccounts
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_scheduler.fit import AdapterLayouts
from loraplex_scheduler.limits import SchedulerLimits
from loraplex_scheduler.plan import AdapterLoad
from loraplex_scheduler.sequence import Sequence

#: Adapters that history remembers; a manifest of an 8B model takes some 2 kB.
_MAX_REMEMBERED: Final = 4096

#: How often history is searched: it changes slowly, and the search looks at all of it.
_HISTORY_EVERY_S: Final = 1.0

#: An adapter this popular was asked for within about two half-lives.
_MIN_POPULARITY: Final = 0.25

#: Popular ones that are tried at a time: more than are loaded at once, as some may not fit.
_MAX_POPULAR: Final = 16

#: Pages that guesses leave free: KV of what comes next should find them without evicting.
_FREE_SHARE: Final = 0.1


class Lookahead:
    """Owned by the scheduler."""

    def __init__(
        self, accounts: PoolAccounts, layouts: AdapterLayouts, limits: SchedulerLimits
    ) -> None:
        self._accounts = accounts
        self._layouts = layouts
        self._limits = limits
        self._hints: OrderedDict[str, AdapterManifest] = OrderedDict()
        self._for_pool: OrderedDict[str, AdapterManifest] = OrderedDict()
        self._recent: OrderedDict[str, AdapterManifest] = OrderedDict()
        self._history_due_s = 0.0

    @property
    def has_hints(self) -> bool:
        """A hint has not been acted upon."""
        return bool(self._hints or self._for_pool)

    def arrive(self, manifest: AdapterManifest) -> None:
        """A request names this adapter."""
        self._recent[manifest.adapter_id] = manifest
        self._recent.move_to_end(manifest.adapter_id)
        if len(self._recent) > _MAX_REMEMBERED:
            self._recent.popitem(last=False)

    def hint(self, manifest: AdapterManifest) -> None:
        """Somebody says that the adapter will be asked for."""
        self._hints[manifest.adapter_id] = manifest
        while len(self._hints) > self._limits.max_running:
            self._hints.popitem(last=False)

    def forget(self, adapter_id: str) -> None:
        """The adapter was deleted."""
        self._hints.pop(adapter_id, None)
        self._for_pool.pop(adapter_id, None)
        self._recent.pop(adapter_id, None)

    def guesses(self, behind: Iterable[AdapterManifest]) -> list[AdapterManifest]:
        """Return what should come into host memory, the surest first; each hint once.

        Args:
            behind: adapters of waiting sequences that this step did not come to.
        """
        wanted = {m.adapter_id: m for m in behind} | self._hints
        self._for_pool |= wanted
        self._hints.clear()
        return [m for i, m in wanted.items() if self._accounts.residency.state(i) is None]

    def try_begin_load(self, running: Collection[Sequence]) -> AdapterLoad | None:
        """Start the load of a guess, or of what is popular, while pages and the loader are idle.

        One at a time: a request that comes right after waits for one load at most. And none where
        adapters are dropped as soon as nobody runs with them.
        """
        residency = self._accounts.residency
        if self._accounts.drops_unused or self._room(()) < 1:
            self._for_pool.clear()
            return None
        if residency.num_loading:
            return None
        self._for_pool |= self._popular()
        room: int | None = None  # takes a look at all who run, so only if it comes to that
        while self._for_pool:
            adapter_id, manifest = self._for_pool.popitem(last=False)
            if residency.state(adapter_id) is not None:
                continue
            room = self._room(running) if room is None else room
            layout = self._layouts.of(manifest)
            if layout.num_pages <= room:
                pages = residency.begin_load(adapter_id, layout.num_pages)
                return AdapterLoad(manifest, layout, pages)
        return None

    def _room(self, running: Collection[Sequence]) -> int:
        """Return how many pages loads may take: none of theirs can be had until they end."""
        num_spared = int(_FREE_SHARE * self._accounts.allocator.num_pages)
        num_to_grow = sum(s.table.pages_missing(s.last_len) for s in running)
        return self._accounts.num_free - max(num_spared, num_to_grow)

    def _popular(self) -> dict[str, AdapterManifest]:
        """Return some absent adapters that were asked for lately, the most popular first."""
        now = self._accounts.clock.now_s
        if now < self._history_due_s:
            return {}
        self._history_due_s = now + _HISTORY_EVERY_S
        residency = self._accounts.residency
        scored = [
            (score, adapter_id)
            for adapter_id in residency.absent(self._recent)
            if (score := residency.popularity(adapter_id)) >= _MIN_POPULARITY
        ]
        first = heapq.nlargest(_MAX_POPULAR, scored)
        return {adapter_id: self._recent[adapter_id] for _, adapter_id in first}
