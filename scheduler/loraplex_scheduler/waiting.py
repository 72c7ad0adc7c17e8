"""Who waits, and in which order they are served."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from loraplex_scheduler.sequence import Sequence


class WaitingQueue(Protocol):
    """Owned by the roster; holds every sequence that waits, each once.

    An order of service must be starvation-free: who waits long enough comes first.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sequence]:
        """Every waiting sequence, in no particular order."""

    def push(self, sequence: Sequence) -> None:
        """A sequence arrives, or comes back because it was preempted."""

    def remove(self, sequence: Sequence) -> None:
        """It was admitted or ended."""

    def in_order(self) -> Iterator[Sequence]:
        """Yield each waiting sequence once, in order of service, lazily.

        The one yielded last may be removed and charged before the next is asked for, and that
        decides who is next; nothing else may change meanwhile.
        """

    def charge_prompt(self, sequence: Sequence, num_tokens: int) -> None:
        """A sequence was admitted and `num_tokens` of its tokens are to be computed for it."""

    def charge_outputs(self, sequences: Iterable[Sequence]) -> None:
        """Each of these got one token more; called once per step."""
