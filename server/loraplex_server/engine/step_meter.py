"""What steps are made of and how long their parts take, counted by the step itself.

All of it is a few additions per step and a pass over its sequences: about a hundredth of the
smallest step (`tests/server/engine/test_step_meter.py` bounds its work, `docs/metrics.md` tells
what was measured).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from loraplex_scheduler.plan import Plan
from loraplex_server.engine.tally import NO_COUNTS, Tally, TallyCounts

#: Upper borders. Of seconds of a step: a step of a small GPU model takes 2 ms, a CPU's up to 1 s.
STEP_S: Final = (
    *(0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08),
    *(0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0),
)
#: Of tokens, as vLLM has them for an iteration; of sequences and adapters.
STEP_TOKENS: Final = tuple(float(2**i) for i in range(15))
STEP_SEQUENCES: Final = tuple(float(2**i) for i in range(11))
STEP_ADAPTERS: Final = (0.0, *(float(2**i) for i in range(9)))
#: Of seconds of a load: from host memory 1 ms and less, from a cold disk seconds.
LOAD_S: Final = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 30.0),
)


@dataclass
class StepParts:
    """Seconds of all steps so far by part, on the host's clock; shared by the core and its runner.

    On a GPU, which computes beside the host, `build_s` is all of the launch and `forward_s` what
    the host then waits; drawing tokens is part of that.
    """

    schedule_s: float = 0.0
    build_s: float = 0.0
    forward_s: float = 0.0
    sample_s: float = 0.0
    commit_s: float = 0.0

    def by_name(self) -> dict[str, float]:
        """Return the seconds of each part."""
        return {
            "schedule": self.schedule_s,
            "build": self.build_s,
            "forward": self.forward_s,
            "sample": self.sample_s,
            "commit": self.commit_s,
        }


@dataclass(frozen=True)
class StepCounts:
    """A snapshot; everything counts since the engine process started.

    Attributes:
        seconds: of steps that computed something.
        part_s: by part, see `StepParts`.
        tokens, sequences, adapters: how many a step computed, and for how many distinct adapters.
        prefill_tokens: computed and part of a prompt, recomputation after preemption included.
        decode_tokens: computed and generated before.
    """

    seconds: TallyCounts = NO_COUNTS
    part_s: dict[str, float] = field(default_factory=dict)
    tokens: TallyCounts = NO_COUNTS
    sequences: TallyCounts = NO_COUNTS
    adapters: TallyCounts = NO_COUNTS
    prefill_tokens: int = 0
    decode_tokens: int = 0


class StepMeter:
    """Owned by the engine step."""

    def __init__(self, parts: StepParts) -> None:
        self.parts = parts
        self._seconds = Tally(STEP_S)
        self._tokens = Tally(STEP_TOKENS)
        self._sequences = Tally(STEP_SEQUENCES)
        self._adapters = Tally(STEP_ADAPTERS)
        self.prefill_tokens = 0
        self._decode_tokens = 0

    def launched(self, plan: Plan) -> None:
        """Count what a plan is made of."""
        num_tokens = num_prefill = 0
        for step in plan.sequences:
            num_tokens += step.num_tokens
            num_left = len(step.request.prompt_token_ids) - step.start
            if num_left > 0:
                num_prefill += min(step.num_tokens, num_left)
        self.prefill_tokens += num_prefill
        self._decode_tokens += num_tokens - num_prefill
        self._tokens.observe(num_tokens)
        self._sequences.observe(len(plan.sequences))
        self._adapters.observe(len(plan.adapters))

    def took(self, seconds: float) -> None:
        """A step that computed something has ended."""
        self._seconds.observe(seconds)

    def counts(self) -> StepCounts:
        """Return everything so far."""
        return StepCounts(
            seconds=self._seconds.counts(),
            part_s=self.parts.by_name(),
            tokens=self._tokens.counts(),
            sequences=self._sequences.counts(),
            adapters=self._adapters.counts(),
            prefill_tokens=self.prefill_tokens,
            decode_tokens=self._decode_tokens,
        )
