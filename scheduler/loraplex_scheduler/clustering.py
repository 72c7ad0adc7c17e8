"""Whether a step takes on one more distinct adapter."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from loraplex_scheduler.sequence import Sequence
from loraplex_scheduler.step_times import StepLoad, StepTimes


class ClusteringPolicy(Protocol):
    """Owned by the scheduler; asked between `begin` and the next `begin` of one step each."""

    def begin(self, running: Collection[Sequence], now: float) -> None:
        """A step's admissions start; these run already."""

    def may_join(self, newcomer: Sequence) -> bool:
        """Whether it may run now; one that may not is passed over. Bounded in time, see classes."""

    def admitted(self, newcomer: Sequence) -> None:
        """It runs now."""


class NoClustering:
    """Whoever's turn it is may join."""

    def begin(self, running: Collection[Sequence], now: float) -> None:
        """Who runs makes no difference."""

    def may_join(self, newcomer: Sequence) -> bool:
        return True

    def admitted(self, newcomer: Sequence) -> None:
        """Who runs makes no difference."""


class SoftClustering:
    """One more distinct adapter must be worth the time that reading it adds to every step.

    A step that takes `t` with `n` sequences serves `n / t` of them per second; a newcomer adds to
    that if it lengthens the step by less than `t / n`. Otherwise it is passed over until it shares
    its adapter with somebody who runs, or for `max_wait_s` after its arrival at most.

    Counted are the steps to come, in which everybody generates: the newcomer's prompt has to be
    computed once, whenever that is.
    """

    def __init__(self, times: StepTimes, max_wait_s: float) -> None:
        self._times = times
        self._max_wait_s = max_wait_s
        self._running: list[Sequence] = []
        self._now = 0.0
        self._adapters: dict[str, int] | None = None  # pages by adapter; made when first asked for
        self._kv_tokens = 0

    def begin(self, running: Collection[Sequence], now: float) -> None:
        self._running = list(running)
        self._now = now
        self._adapters = None

    def may_join(self, newcomer: Sequence) -> bool:
        if newcomer.adapter_id is None or not self._running:
            return True
        if self._now - newcomer.request.arrival_s > self._max_wait_s:
            return True
        adapters = self._survey() if self._adapters is None else self._adapters
        if newcomer.adapter_id in adapters:
            return True
        num_running, pages = len(self._running), sum(adapters.values())
        before = self._times.step_s(StepLoad(num_running, num_running, self._kv_tokens, pages))
        after = self._times.step_s(
            StepLoad(
                num_running + 1,
                num_running + 1,
                self._kv_tokens + newcomer.num_tokens,
                pages + newcomer.num_adapter_pages,
            )
        )
        return after - before < before / num_running

    def admitted(self, newcomer: Sequence) -> None:
        self._running.append(newcomer)
        if self._adapters is not None:
            self._count(newcomer, self._adapters)

    def _survey(self) -> dict[str, int]:
        adapters: dict[str, int] = {}
        self._kv_tokens = 0
        for sequence in self._running:
            self._count(sequence, adapters)
        self._adapters = adapters
        return adapters

    def _count(self, sequence: Sequence, adapters: dict[str, int]) -> None:
        self._kv_tokens += sequence.num_tokens
        adapter_id = sequence.adapter_id
        if adapter_id is not None and adapter_id not in adapters:
            adapters[adapter_id] = sequence.num_adapter_pages
