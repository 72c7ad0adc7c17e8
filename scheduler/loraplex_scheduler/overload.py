"""What is refused when more is asked for than can be done in time."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from loraplex_scheduler.limits import SchedulerLimits
from loraplex_scheduler.sequence import Sequence
from loraplex_scheduler.waiting import WaitingQueue


@dataclass(frozen=True)
class Rejection:
    """Why a request is turned away, and when it may come again (seconds from now)."""

    message: str
    retry_after_s: float


class Situation(Protocol):
    """What an overload policy may look at; implemented by the scheduler."""

    @property
    def limits(self) -> SchedulerLimits: ...

    @property
    def running(self) -> Collection[Sequence]: ...

    @property
    def waiting(self) -> WaitingQueue: ...

    @property
    def num_obtainable(self) -> int:
        """Pages that are free or could be made free by eviction."""

    def is_resident(self, adapter_id: str) -> bool: ...


class OverloadPolicy(Protocol):
    """Owned by the scheduler."""

    def refuse(self, newcomer: Sequence, situation: Situation, now: float) -> Rejection | None:
        """Decide on arrival, before the newcomer waits; None accepts it."""

    def drop(self, situation: Situation, now: float) -> list[tuple[Sequence, Rejection]]:
        """Return who waits without a token yet and cannot be served in time any more.

        Called before each step's admissions; must cost next to nothing when nobody is late.
        """
