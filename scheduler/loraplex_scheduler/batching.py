"""What a step is made of: decodes and prefill together, or apart."""

from __future__ import annotations

from typing import Protocol


class BatchingPolicy(Protocol):
    """Owned by the scheduler; asked once per step."""

    @property
    def is_mixed(self) -> bool:
        """Whether newcomers are computed in the same step as those who run already.

        If not, a step that admits somebody computes nobody else.
        """

    def may_admit(self, num_running: int) -> bool:
        """Whether this step may admit waiting sequences."""

    def launched(self, *, has_admitted: bool) -> None:
        """A step was decided that computes something."""
