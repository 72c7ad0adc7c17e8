"""How long a step takes, and a load: what promises, admission and eviction reckon with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from loraplex_scheduler.calibration import LinearFit


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


#: Steps observed before only every fourth one is: by then it takes more than one to change a lot.
_NUM_CLOSELY: Final = 256

#: No token is free, or eviction would take prompts to cost nothing before much is known.
_MIN_TOKEN_S: Final = 1e-8


class CalibratedStepTimes:
    """Learns from the steps and loads that were. A step's time is taken to be linear in its load:
    its launch and the weights, each token's arithmetic, each sequence's and cached token's memory
    traffic, each adapter page's. A load has a fixed time and one per page.

    Before the first step it knows a machine of about 10 ms a step and 100,000 tokens a second.
    """

    def __init__(self, page_tokens: int) -> None:
        """
        Args:
            page_tokens: tokens of KV per page.
        """
        self._page_tokens = page_tokens
        self._steps = LinearFit(
            prior=(1e-2, 1e-5, 1e-5, 1e-8, 1e-8),
            forgetting=0.995,
        )
        self._loads = LinearFit(prior=(2e-3, 2e-5), forgetting=0.98)
        self._num_steps = 0

    def step_s(self, load: StepLoad) -> float:
        """Predict the time of a step."""
        fixed, token, sequence, kv, adapter = self._steps.coefficients
        return (
            fixed
            + token * load.num_tokens
            + sequence * load.num_sequences
            + kv * load.kv_tokens
            + adapter * load.adapter_pages
        )

    def observe_step(self, load: StepLoad, took_s: float) -> None:
        """A step took so long."""
        self._num_steps += 1
        is_due = self._num_steps <= _NUM_CLOSELY or self._num_steps % 4 == 0
        if not is_due or took_s <= 0 or load.num_tokens == 0:
            return
        features = (
            1.0,
            load.num_tokens,
            load.num_sequences,
            load.kv_tokens,
            load.adapter_pages,
        )
        self._steps.observe(features, took_s)

    def adapter_s(self, num_pages: int) -> float:
        """Predict the time to load an adapter of so many pages."""
        fixed, page = self._loads.coefficients
        return fixed + page * num_pages

    def observe_load(self, num_pages: int, took_s: float) -> None:
        """A load took so long."""
        if took_s > 0:
            self._loads.observe((1.0, num_pages), took_s)

    def prefix_page_s(self) -> float:
        """Predict the time to compute one page of a prompt again, as part of a larger step."""
        return max(self._steps.coefficients[1], _MIN_TOKEN_S) * self._page_tokens
