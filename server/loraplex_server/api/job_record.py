"""What is remembered of one job: data only, for traces and access lines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from loraplex_scheduler.plan import FinishReason, StartTimes

#: What nobody wants of a server; whoever cancels has changed their mind.
ERRORS: Final = frozenset(
    {FinishReason.FAILED, FinishReason.TIMED_OUT, FinishReason.REFUSED, FinishReason.REJECTED}
)


@dataclass
class SequenceRecord:
    """One sequence, in seconds of the job's clock; `first_token_s` is None until there is one."""

    first_token_s: float | None = None
    times: StartTimes | None = None
    num_prompt: int = 0
    end_s: float = 0.0
    num_generated: int = 0
    outcome: FinishReason | None = None


@dataclass
class JobRecord:
    """One job as it went: for traces and access lines.

    Attributes:
        model: the adapters that answered, or the base model.
        arrival_s: on the same clock as all times here, as is `now_s` of whoever reads them.
    """

    model: str
    adapter_ids: tuple[str, ...]
    tenant: str
    num_prompt_tokens: int
    arrival_s: float
    sequences: list[SequenceRecord] = field(default_factory=list)

    @property
    def num_generated(self) -> int:
        return sum(sequence.num_generated for sequence in self.sequences)
