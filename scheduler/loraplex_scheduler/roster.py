"""Who is being served: every live sequence, in order of service.

    WAITING    no pages, no pin                           --admit-->   RUNNING
    RUNNING    pages for its tokens, its adapter pinned   --preempt--> WAITING
                                                          --finish-->  FINISHING
    FINISHING  no pages, no pin: its last token is on the way

Moving a sequence moves what it holds with it, so no pin or page outlives its reason. What a
sequence gives back may be read and written by launched steps for a while: see `Scheduler`.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from itertools import takewhile

from loraplex_memory.residency import AdapterResidency
from loraplex_scheduler.sequence import Sequence


class Roster:
    """Owned by the scheduler. A live sequence is in one of the lists; each is oldest first."""

    def __init__(self, residency: AdapterResidency) -> None:
        self._residency = residency
        self._by_id: dict[str, Sequence] = {}
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.finishing: list[Sequence] = []

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
        sequence.table.grow(sequence.num_tokens)
        if sequence.adapter_id:
            self._residency.pin(sequence.adapter_id)
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_service_order)

    def preempt(self, sequence: Sequence) -> None:
        """Take everything from a running sequence; it waits in its old place and recomputes."""
        self._release(sequence)
        sequence.num_computed = 0
        insort(self.waiting, sequence, key=_service_order)

    def finish(self, sequence: Sequence) -> None:
        """Take everything from a running sequence that has nothing left to compute."""
        self._release(sequence)
        insort(self.finishing, sequence, key=_service_order)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that ended."""
        del self._by_id[sequence.request_id]
        if sequence.table.pages:
            self._release(sequence)
        elif sequence.is_complete:
            self.finishing.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def adapters_awaited_before(self, sequence: Sequence) -> set[str]:
        """Return the adapters of waiting sequences that are older than this one."""
        order = _service_order(sequence)
        older = takewhile(lambda s: _service_order(s) < order, self.waiting)
        return {s.adapter_id for s in older if s.adapter_id}

    def check(self) -> None:
        """Raise AssertionError if a sequence is lost, doubled, or holds what it may not."""
        listed = [*self.waiting, *self.running, *self.finishing]
        assert len(listed) == len(self._by_id), "a request is lost or doubled"
        assert all(self._by_id[s.request_id] is s for s in listed), "a request is not listed"
        for sequence in (*self.waiting, *self.finishing):
            assert not sequence.table.pages, "a sequence that does not run holds pages"
        for sequence in (*self.waiting, *self.running):
            assert not sequence.is_complete, "nothing is left to compute"
            assert sequence.num_pending > 0, "nothing is left to compute"
        for sequence in self.finishing:
            assert sequence.is_complete, "a finishing sequence has tokens to compute"
            assert sequence.num_awaited > 0, "a finishing sequence waits for nothing"
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
