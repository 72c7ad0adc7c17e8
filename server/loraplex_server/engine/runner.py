"""Computing a plan: forward batch and LoRA batch in, one token per sampled sequence out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from loraplex_kernels.ops import host_backend
from loraplex_kernels.row_max import row_max
from loraplex_memory.pool import PagePool
from loraplex_scheduler.plan import Plan, SequenceStep, StepResult
from loraplex_server.engine.forward_batch import BatchBuilder
from loraplex_server.engine.step_meter import StepParts
from loraplex_server.model.adapter_edits import AdapterEdits
from loraplex_server.model.sampler import sample
from loraplex_server.model.transformer import Transformer

NOT_FINITE = (
    "the model produced values that are not finite; if only this adapter does, its weights overflow"
)


class Flight(Protocol):
    """A step on its way through the device."""

    def result(self) -> StepResult:
        """Wait for the step and return what it sampled; called once."""


class StepRunner(Protocol):
    """Computes plans, one after the other, in the order in which they are launched.

    A plan says everything, but for one thing: where a sequence awaits a token, its last input is
    what the launch before this one sampled for the same request id.
    """

    def launch(self, plan: Plan) -> Flight:
        """Start computing a plan that has sequences; need not wait for anything."""


@dataclass(frozen=True)
class Landed:
    """A flight that had arrived when it was launched."""

    step: StepResult

    def result(self) -> StepResult:
        return self.step


class Runner:
    """The runner of a CPU, owned by the engine step: a launch computes before it returns.

    Holds no state of any sequence but the token ids that the last launch sampled.
    """

    def __init__(self, model: Transformer, pool: PagePool, parts: StepParts | None = None) -> None:
        """`parts`: where to book the time of computing and of drawing tokens."""
        self._parts = parts or StepParts()
        self._model = model
        self._pool = pool
        self._backend = host_backend()
        self._batches = BatchBuilder(pool.layout)
        self._last_sampled: dict[str, int] = {}

    def launch(self, plan: Plan) -> Landed:
        result = self._compute(plan)
        # Whoever failed may have been launched again before that was known; any id will do then,
        # as what comes of it is dropped.
        self._last_sampled = dict.fromkeys(result.failures, 0)
        self._last_sampled |= {i: token.token_id for i, token in result.tokens.items()}
        return Landed(result)

    @torch.inference_mode()
    def _compute(self, plan: Plan) -> StepResult:
        """Compute every sequence of the plan and draw the tokens it asks for."""
        steps = plan.sequences
        attention = self._batches.attention(plan)
        token_ids = torch.tensor([t for s in steps for t in self._inputs(s)], dtype=torch.int64)
        ends = attention.query_indptr[1:].tolist()
        sampled = [
            (step, end - 1) for step, end in zip(steps, ends, strict=True) if step.is_sampled
        ]
        logit_rows = [row for _, row in sampled]
        edited = self._batches.edits(plan, logit_rows)
        started = time.monotonic()
        logits = self._model.forward(
            token_ids,
            self._backend.prepare(
                attention, self._batches.lora(plan), self._batches.more_lora(plan)
            ),
            self._pool,
            torch.tensor(logit_rows, dtype=torch.int64),
            edits=AdapterEdits(edited, attention, self._pool) if edited else None,
        )
        computed = time.monotonic()
        result = _draw(logits, [step for step, _ in sampled])
        self._parts.forward_s += computed - started
        self._parts.sample_s += time.monotonic() - computed
        return result

    def _inputs(self, step: SequenceStep) -> tuple[int, ...]:
        if step.awaits_token:
            return *step.token_ids, self._last_sampled[step.request_id]
        return step.token_ids


def _draw(logits: torch.Tensor, steps: Sequence[SequenceStep]) -> StepResult:
    """Draw a token of each row, but none from a row that is not finite.

    An adapter's finite weights can still overflow; its request fails, its neighbours do not.
    """
    if not steps:
        return StepResult({})
    is_sound = torch.isfinite(row_max(logits)[0]).tolist()
    if not all(is_sound):
        logits = logits[torch.tensor(is_sound)]
    sound = [step for step, ok in zip(steps, is_sound, strict=True) if ok]
    tokens = {s.request_id: t for s, t in zip(sound, sample(logits, sound), strict=True)}
    failed = [step.request_id for step, ok in zip(steps, is_sound, strict=True) if not ok]
    return StepResult(tokens, dict.fromkeys(failed, NOT_FINITE))
