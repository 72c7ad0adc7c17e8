"""How much of the pool a newcomer must leave to those who run already."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from loraplex_scheduler.sequence import Sequence


class AdmissionPolicy(Protocol):
    """Owned by the scheduler; asked between `begin` and the next `begin` of one step each."""

    def begin(self, running: Collection[Sequence]) -> None:
        """A step's admissions start; these run already."""

    def pages_to_leave(self, newcomer: Sequence) -> int:
        """Return how many pages must still be free or evictable once the newcomer has its own.

        Its own are those for all its tokens so far; its adapter's are counted by the scheduler.
        """

    def admitted(self, newcomer: Sequence) -> None:
        """It runs now, with pages for all its tokens so far."""

    def ended(self, sequence: Sequence) -> None:
        """A sequence ended by itself; its `num_generated` is how long its answer became."""
