"""How long a step takes, and a load: what promises, admission and eviction reckon with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What a step's time depends on.

    Attributes:
        num_tokens: rows computed.
        num_sequences: sequences among which they are divided.
        kv_tokens: tokens whose keys and values are read, over all sequences.
        adapter_pages: pages of the distinct adapters that are read.
    """

    num_tokens: int
    num_sequences: int
    kv_tokens: int
    adapter_pages: int


class StepTimes(Protocol):
    """Owned by the scheduler. All results in seconds; also implements `RestoreCosts` of memory."""

    def step_s(self, load: StepLoad) -> float:
        """Predict the time of a step."""

    def observe_step(self, load: StepLoad, took_s: float) -> None:
        """A step took so long."""

    def adapter_s(self, num_pages: int) -> float:
        """Predict the time to load an adapter of so many pages."""

    def observe_load(self, num_pages: int, took_s: float) -> None:
        """A load took so long."""

    def prefix_page_s(self) -> float:
        """Predict the time to compute one page of a prompt again, as part of a larger step."""
