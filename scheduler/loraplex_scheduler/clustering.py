"""Whether a step takes on one more distinct adapter."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from loraplex_scheduler.sequence import Sequence


class ClusteringPolicy(Protocol):
    """Owned by the scheduler; asked between `begin` and the next `begin` of one step each."""

    def begin(self, running: Collection[Sequence], now: float) -> None:
        """A step's admissions start; these run already."""

    def may_join(self, newcomer: Sequence) -> bool:
        """Whether it may run now; one that may not is passed over. Bounded in time, see classes."""

    def admitted(self, newcomer: Sequence) -> None:
        """It runs now."""
