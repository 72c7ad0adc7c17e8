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


class MixedBatching:
    """Each step computes the next token of all who generate and fills up with prompts."""

    @property
    def is_mixed(self) -> bool:
        return True

    def may_admit(self, num_running: int) -> bool:
        return True

    def launched(self, *, has_admitted: bool) -> None:
        """Steps are alike."""


class SeparatePrefill:
    """S-LoRA's: newcomers are considered when nothing runs and every so many steps, and a step that
    admits any computes their prompts and nothing else (its `RouterManager._step`).
    """

    def __init__(self, admit_every: int = 10) -> None:
        """
        Args:
            admit_every: steps from one admission to when the next is considered.
        """
        self._admit_every = admit_every
        self._num_since = 0

    @property
    def is_mixed(self) -> bool:
        return False

    def may_admit(self, num_running: int) -> bool:
        return num_running == 0 or self._num_since >= self._admit_every

    def launched(self, *, has_admitted: bool) -> None:
        self._num_since = 0 if has_admitted else self._num_since + 1
