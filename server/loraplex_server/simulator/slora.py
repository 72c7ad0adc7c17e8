"""S-LoRA's engine, in so far as it decides differently (arXiv 2311.03285 and its repository).

| | |
|---|---|
| pool | pages of one token, as many as published |
| admission | first come, first served; the worst case of all is reserved (`WorstCase`) |
| batching | prompts whole, in steps of their own; newcomers looked at every 10 decode steps |
| adapters | all that no running request uses leave whenever a request ends (`DropUnused`) |
| loads | on the critical path: prefill waits for them, and everybody waits for prefill |
| prefix cache | none |
| kernels | decode gathers the adapter for every row; prefill per adapter |
| overload | nothing, or early abort (`EarlyAbort`) |
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator
from typing import Final

from loraplex_scheduler.admission import AdmissionPolicy
from loraplex_scheduler.overload import Rejection
from loraplex_scheduler.sequence import Sequence
from loraplex_scheduler.ttft import Situation
from loraplex_scheduler.waiting import Ahead, arrival_key

#: `max_wait_tokens` of its router: decode steps between two looks at the queue.
GATE_STEPS: Final = 10

#: Early abort gives a request up this long before its first token is due.
_ABORT_MARGIN_S: Final = 0.5


class Gate:
    """Its batching policy, and what it knows of loads. Owned by one scheduler and its replica.

    The gate opens every `gate_steps` steps, and when nothing runs. It stays open over the loads
    that a look at the queue asked for, so that those they were for are prefilled next.
    """

    is_mixed: Final = False

    def __init__(self, admission: AdmissionPolicy, gate_steps: int = GATE_STEPS) -> None:
        self.admission = _Watched(admission)
        self._gate_steps = gate_steps
        self._num_steps = gate_steps
        self._is_open = True

    def may_admit(self, num_running: int) -> bool:
        """Return whether the queue is looked at in this step."""
        self._is_open = num_running == 0 or self._num_steps >= self._gate_steps
        if not self._is_open:
            self.admission.asked.clear()
        return self._is_open

    def launched(self, *, has_admitted: bool) -> None:
        """Count a decode step, or start again after a look at the queue."""
        self._num_steps = 0 if self._is_open or has_admitted else self._num_steps + 1

    def is_needed(self, adapter_id: str) -> bool:
        """Return whether the last look at the queue came to a request that needs the adapter."""
        return adapter_id in self.admission.asked

    def loaded(self) -> None:
        """Look at the queue again with the next step."""
        self._num_steps = self._gate_steps


class _Watched:
    """An admission policy that remembers whose adapters it was asked about in this step."""

    def __init__(self, admission: AdmissionPolicy) -> None:
        self._admission = admission
        self.asked: set[str] = set()

    def begin(self, running: Collection[Sequence]) -> None:
        self.asked.clear()
        self._admission.begin(running)

    def is_enough(self, num_pages: int, newcomer: Sequence) -> bool:
        if newcomer.adapter_id is not None:
            self.asked.add(newcomer.adapter_id)
        return self._admission.is_enough(num_pages, newcomer)

    def admitted(self, newcomer: Sequence) -> None:
        self._admission.admitted(newcomer)

    def ended(self, sequence: Sequence) -> None:
        self._admission.ended(sequence)


class EarlyAbort:
    """Its queue under `--abort`: who cannot be in time leaves; the newest go first under overload.

    With moving averages, at every look at the queue, of its growth (weight .7) and of how many were
    admitted (weight .7, at least 1), the newest are taken first while the queue grows at least as
    fast as it is served, else the oldest.
    """

    def __init__(self, slo_s: float) -> None:
        self._slo_s = slo_s
        self._by_age: list[Sequence] = []
        self._growth = 0.0
        self._served = 1.0
        self._num_before = 0
        self._num_admitted = 0

    def __len__(self) -> int:
        return len(self._by_age)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._by_age

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._by_age)

    def push(self, sequence: Sequence) -> None:
        insort(self._by_age, sequence, key=arrival_key)

    def remove(self, sequence: Sequence) -> None:
        del self._by_age[bisect_left(self._by_age, arrival_key(sequence), key=arrival_key)]

    def in_order(self) -> Iterator[Sequence]:
        self._look()
        order = list(self._by_age)
        return iter(order[::-1] if self._growth >= self._served else order)

    def ahead_of(self, newcomer: Sequence, limit: int) -> Ahead:
        return Ahead(self._by_age[:limit], max(0, len(self) - limit))

    def charge_prompt(self, sequence: Sequence, num_tokens: int) -> None:
        self._num_admitted += 1

    def charge_outputs(self, sequences: Collection[Sequence]) -> None:
        """Tokens change nothing here."""

    def settle(self, sequence: Sequence) -> None:
        """Nothing was charged."""

    # ---- as an overload policy -----------------------------------------------------------------

    def refuse(self, newcomer: Sequence, situation: Situation, now: float) -> Rejection | None:
        """Let everybody wait."""
        return None

    def drop(self, situation: Situation, now: float) -> list[tuple[Sequence, Rejection]]:
        """Return who has waited for almost the whole SLO."""
        latest = now + _ABORT_MARGIN_S - self._slo_s
        late = []
        for sequence in self._by_age:
            if sequence.request.arrival_s > latest:
                break
            if sequence.num_generated == 0:
                late.append((sequence, Rejection("it waited too long", retry_after_s=0.0)))
        return late

    def _look(self) -> None:
        growth = len(self) + self._num_admitted - self._num_before
        self._growth = 0.7 * growth + 0.3 * self._growth
        self._served = max(1.0, 0.7 * self._num_admitted + 0.3 * self._served)
        self._num_before, self._num_admitted = len(self), 0
