"""The steps that were launched and whose results have not been booked, oldest first.

A flight knows its sequences as objects, not by request id: an id may be used again while a result
of its former owner is on the way, and the newcomer must not get that token.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from loraplex_scheduler.plan import Plan
from loraplex_scheduler.sequence import Sequence
from loraplex_scheduler.step_times import StepLoad


@dataclass(frozen=True)
class Flight:
    """A plan, whose sequences those of the plan are, in its order, and what it costs."""

    plan: Plan
    sequences: tuple[Sequence, ...]
    load: StepLoad


class Flights:
    """Owned by the scheduler. Results are booked in the order of the launches."""

    def __init__(self) -> None:
        self._flights: deque[Flight] = deque()

    def __len__(self) -> int:
        return len(self._flights)

    def start(self, flight: Flight) -> None:
        """Remember who computes what in a step that was launched."""
        self._flights.append(flight)

    def land(self, plan: Plan) -> Flight:
        """Forget the oldest flight and return it."""
        assert self._flights, "nothing was launched"
        assert self._flights[0].plan is plan, "results must come in the order of the launches"
        return self._flights.popleft()

    def num_awaited(self, sequence: Sequence) -> int:
        """Count the tokens of a sequence that are on the way."""
        return sum(
            step.is_sampled
            for flight in self._flights
            for step, owner in zip(flight.plan.sequences, flight.sequences, strict=True)
            if owner is sequence
        )
