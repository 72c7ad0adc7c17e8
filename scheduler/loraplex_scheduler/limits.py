"""What bounds one engine's steps and sequences."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SchedulerLimits:
    """Bounds of one engine.

    Attributes:
        max_step_tokens: tokens computed in one step, over all sequences.
        max_running: sequences that hold KV pages at once.
        max_model_len: tokens of one sequence, prompt and output.
        max_loading: adapters being loaded at once.
        eos_token_ids: tokens that end a sequence of this model.
    """

    max_step_tokens: int
    max_running: int
    max_model_len: int
    max_loading: int = 4
    eos_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.max_running > self.max_step_tokens:
            raise ValueError(
                f"max_running {self.max_running} exceeds max_step_tokens {self.max_step_tokens}: "
                "a step must have room for one token of every running sequence"
            )
