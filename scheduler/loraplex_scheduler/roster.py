"""Who is being served: every live sequence, waiting or running, in order of service.

    WAITING   no pages, no pin                              --admit-->   RUNNING
    RUNNING   pages for its tokens, its adapter pinned      --preempt--> WAITING

Moving a sequence moves what it holds with it, so no pin or page outlives its reason.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from itertools import takewhile

from loraplex_memory.residency import AdapterResidency
from loraplex_scheduler.sequence import Sequence


class Roster:
    """Owned by the scheduler. Both lists are oldest first; a live request id is in one of them."""

    def __init__(self, residency: AdapterResidency) -> None:
        self._residency = residency
        self._by_id: dict[str, Sequence] = {}
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._by_id.values())

    def get(self, request_id: str) -> Sequence | None:
        return self._by_id.get(request_id)

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait."""
        self._by_id[sequence.request_id] = sequence
        insort(self.waiting, sequence, key=_service_order)

    def admit(self, sequence: Sequence) -> None:
        """Take pages for all tokens of a waiting sequence, pin its adapter, let it run."""
        sequence.table.grow(len(sequence.token_ids))
        if sequence.adapter_id:
            self._residency.pin(sequence.adapter_id)
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_service_order)

    def preempt(self, sequence: Sequence) -> None:
        """Take everything from a running sequence; it waits in its old place and recomputes."""
        self._release(sequence)
        sequence.num_computed = 0
        insort(self.waiting, sequence, key=_service_order)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that ended."""
        del self._by_id[sequence.request_id]
        if sequence.table.pages:
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def adapters_awaited_before(self, sequence: Sequence) -> set[str]:
        """Return the adapters of waiting sequences that are older than this one."""
        order = _service_order(sequence)
        older = takewhile(lambda s: _service_order(s) < order, self.waiting)
        return {s.adapter_id for s in older if s.adapter_id}

    def check(self) -> None:
        """Raise AssertionError if a sequence is lost, doubled, or holds what it may not."""
        live = {s.request_id for s in self.waiting} | {s.request_id for s in self.running}
        assert live == set(self._by_id), "a request is lost"
        assert len(live) == len(self.waiting) + len(self.running), "a request is doubled"
        assert all(not s.table.pages for s in self.waiting), "a waiting sequence holds pages"
        pages = [page for s in self.running for page in s.table.pages]
        assert len(pages) == len(set(pages)), "two sequences hold the same page"
        for sequence in self.running:
            assert sequence.table.capacity >= sequence.num_computed, "tokens without a page"
            if sequence.adapter_id:
                assert self._residency.is_resident(sequence.adapter_id), "adapter gone"
        pins = [s.adapter_id for s in self.running if s.adapter_id]
        assert self._residency.num_pins() == len(pins), "pins and running sequences disagree"

    def _release(self, sequence: Sequence) -> None:
        sequence.table.release()
        self.running.remove(sequence)
        if sequence.adapter_id:
            self._residency.unpin(sequence.adapter_id)


def _service_order(sequence: Sequence) -> tuple[float, int]:
    return sequence.request.arrival_s, sequence.order
