"""Computing a plan: forward batch and LoRA batch in, one token per sampled sequence out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from loraplex_kernels.ops import backend_of, host_backend
from loraplex_kernels.row_max import row_max
from loraplex_memory.pool import PagePool
from loraplex_scheduler.plan import Plan, SequenceStep, StepResult
from loraplex_server.engine.forward_batch import BatchBuilder
from loraplex_server.engine.prompt_reports import PromptReports, WantedRows
from loraplex_server.engine.step_meter import StepParts
from loraplex_server.model.adapter_edits import AdapterEdits
from loraplex_server.model.sampler import sample
from loraplex_server.model.token_masks import GrammarMasks, mask_rows
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

    def close(self) -> None:
        """Wait for what was launched, and give up what it was recorded as; nothing comes after."""


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

    def __init__(
        self,
        model: Transformer,
        pool: PagePool,
        grammars: GrammarMasks | None = None,
        parts: StepParts | None = None,
    ) -> None:
        """Prepare to compute plans over `pool`.

        Args:
            grammars: knows those of its requests.
            parts: where to book the time of computing and of drawing tokens.
        """
        self._parts = parts or StepParts()
        self._model = model
        self._pool = pool
        self._grammars = grammars
        self._backend = backend_of(model.group, host_backend())
        # All ranks have the logits, but requests' grammars are known to the first alone.
        self._is_sampling = model.group is None or model.group.rank == 0
        self._batches = BatchBuilder(pool.layout)
        self._last_sampled: dict[str, int] = {}

    def launch(self, plan: Plan) -> Landed:
        result = self._compute(plan)
        # Whoever failed may have been launched again before that was known; any id will do then,
        # as what comes of it is dropped.
        self._last_sampled = dict.fromkeys((*result.failures, *result.dead_ends), 0)
        self._last_sampled |= {i: token.token_id for i, token in result.tokens.items()}
        return Landed(result)

    def close(self) -> None:
        """See `StepRunner`: launching is computing."""

    @torch.inference_mode()
    def _compute(self, plan: Plan) -> StepResult:
        """Compute every sequence of the plan and draw the tokens it asks for."""
        steps = plan.sequences
        attention = self._batches.attention(plan)
        token_ids = torch.tensor([t for s in steps for t in self._inputs(s)], dtype=torch.int64)
        wanted = WantedRows.of(steps, attention.query_indptr[1:].tolist())
        edited = self._batches.edits(plan, wanted.rows)
        edits = AdapterEdits(edited, attention, self._pool) if edited else None
        started = time.monotonic()
        ops = self._backend.prepare(
            attention, self._batches.lora(plan), self._batches.more_lora(plan)
        )
        rows = torch.tensor(wanted.rows, dtype=torch.int64)
        if not wanted.has_reports:
            logits = self._model.forward(token_ids, ops, self._pool, rows, edits=edits)
            return self._timed_draw(logits, wanted.drawn, started)
        states = self._model.final_states(token_ids, ops, self._pool, rows, edits)
        logits = states.logits(0, len(wanted.drawn))
        result = self._timed_draw(logits, wanted.drawn, started)
        PromptReports.of(wanted, states).add_to(result, NOT_FINITE)
        return result

    def _timed_draw(
        self, logits: torch.Tensor, steps: Sequence[SequenceStep], started: float
    ) -> StepResult:
        computed = time.monotonic()
        result = _draw(logits, steps, self._grammars) if self._is_sampling else StepResult({})
        self._parts.forward_s += computed - started
        self._parts.sample_s += time.monotonic() - computed
        return result

    def _inputs(self, step: SequenceStep) -> tuple[int, ...]:
        if step.awaits_token:
            return *step.token_ids, self._last_sampled[step.request_id]
        return step.token_ids


def _draw(
    logits: torch.Tensor, steps: Sequence[SequenceStep], grammars: GrammarMasks | None
) -> StepResult:
    """Draw a token of each row, but none from a row that is not finite or may choose none.

    An adapter's finite weights can still overflow; its request fails, its neighbours do not.
    """
    if not steps:
        return StepResult({})
    is_sound = torch.isfinite(row_max(logits)[0]).tolist()
    if not all(is_sound):
        logits = logits[torch.tensor(is_sound)]
    sound = [step for step, ok in zip(steps, is_sound, strict=True) if ok]
    failed = [step.request_id for step, ok in zip(steps, is_sound, strict=True) if not ok]
    masks = mask_rows(sound, logits.shape[1], grammars)
    drawn = sample(logits, sound, masks)
    tokens = {
        step.request_id: token
        for at, (step, token) in enumerate(zip(sound, drawn, strict=True))
        if at not in masks.failures
    }
    dead_ends = {sound[at].request_id: reason for at, reason in masks.failures.items()}
    return StepResult(tokens, dict.fromkeys(failed, NOT_FINITE), dead_ends=dead_ends)
