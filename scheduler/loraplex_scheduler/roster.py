"""Who is being served: every live sequence.

    WAITING    no pages, no pin                           --admit-->   RUNNING
    RUNNING    pages for its tokens, its adapters pinned  --preempt--> WAITING
                                                          --finish-->  FINISHING
    FINISHING  no pages, no pin: its last token is on the way

Moving a sequence moves what it holds with it, so no pin or page outlives its reason; what it has
computed is left to the prefix cache. What a sequence gives back may be read and written by launched
steps for a while: see `Scheduler`.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from operator import attrgetter

from loraplex_memory.residency import AdapterResidency
from loraplex_scheduler.plan import PlannedAdapter
from loraplex_scheduler.sequence import Sequence
from loraplex_scheduler.waiting import WaitingQueue

_SERVICE_KEY = attrgetter("service_key")


class Roster:
    """Owned by the scheduler. A live sequence waits, runs or finishes.

    Attributes:
        waiting: ordered by the policy of service.
        running: by `service_key`; the last one gives way first.
        finishing: in no order.
        historic: those who run whose next token depends on the ids of all tokens before.
    """

    def __init__(self, residency: AdapterResidency, waiting: WaitingQueue) -> None:
        self._residency = residency
        self._by_id: dict[str, Sequence] = {}
        self.waiting = waiting
        self.running: list[Sequence] = []
        self.finishing: set[Sequence] = set()
        self.historic: set[Sequence] = set()

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._by_id.values())

    def get(self, request_id: str) -> Sequence | None:
        return self._by_id.get(request_id)

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait."""
        self._by_id[sequence.request_id] = sequence
        self.waiting.push(sequence)

    def admit(self, sequence: Sequence) -> None:
        """Let a waiting sequence run that has pages for all its tokens; pin its adapters."""
        for manifest, layout in sequence.adapters:
            adapter_id = manifest.adapter_id
            self._residency.pin(adapter_id)
            pages = self._residency.pages(adapter_id)
            sequence.planned[adapter_id] = PlannedAdapter(layout, pages)
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_SERVICE_KEY)
        if sequence.needs_history:
            self.historic.add(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take everything from a running sequence; it waits again and recomputes."""
        self._release(sequence)
        sequence.num_computed = 0
        self.waiting.push(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take everything from a running sequence that has nothing left to compute."""
        self._release(sequence)
        self.finishing.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that ended."""
        del self._by_id[sequence.request_id]
        sequence.is_live = False
        self.waiting.settle(sequence)
        if sequence.table.pages:
            self._release(sequence)
        elif sequence in self.finishing:
            self.finishing.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def check(self) -> None:
        """Raise AssertionError if a sequence is lost, doubled, or holds what it may not."""
        waiting = list(self.waiting)
        listed = [*waiting, *self.running, *self.finishing]
        assert len(waiting) == len(self.waiting), "the queue miscounts"
        assert len(listed) == len(self._by_id), "a request is lost or doubled"
        assert all(self._by_id[s.request_id] is s and s.is_live for s in listed), "not listed"
        for sequence in (*waiting, *self.finishing):
            assert not sequence.table.pages, "a sequence that does not run holds pages"
        for sequence in (*waiting, *self.running):
            assert not sequence.is_complete, "nothing is left to compute"
            assert sequence.num_pending > 0, "nothing is left to compute"
        for sequence in self.finishing:
            assert sequence.is_complete, "a finishing sequence has tokens to compute"
            assert sequence.num_awaited > 0, "a finishing sequence waits for nothing"
        private = [page for s in self.running for page in s.table.pages[s.table.num_shared :]]
        assert len(private) == len(set(private)), "two sequences write to the same page"
        for sequence in self.running:
            assert sequence.table.capacity >= sequence.num_computed, "tokens without a page"
            for manifest, _ in sequence.adapters:
                assert self._residency.is_resident(manifest.adapter_id), "adapter gone"
        assert self.running == sorted(self.running, key=_SERVICE_KEY), "out of order"
        assert self.historic == {s for s in self.running if s.needs_history}
        num_pins = sum(len(s.adapters) for s in self.running)
        assert self._residency.num_pins() == num_pins, "pins and running sequences disagree"

    def _release(self, sequence: Sequence) -> None:
        sequence.publish_computed()
        sequence.table.release()
        self.running.remove(sequence)
        self.historic.discard(sequence)
        sequence.planned = {}
        for manifest, _ in sequence.adapters:
            self._residency.unpin(manifest.adapter_id)
