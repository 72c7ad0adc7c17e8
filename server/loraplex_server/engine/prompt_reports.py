"""What requests want of final hidden states beside a next token, from a plan to its result.

Log probabilities of prompts are taken of slices of rows, as the logits of a whole step would need
the memory of its tokens times the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import torch

from loraplex_scheduler.plan import (
    HIDDEN_UNIT,
    Pooling,
    SequenceStep,
    StepResult,
    TokenLogprobs,
)
from loraplex_server.model.device_copy import copy_from, copy_to
from loraplex_server.model.final_states import FinalStates
from loraplex_server.model.sampler import RowLogprobs, judge

#: Rows whose logits are computed at once: 128 of a vocabulary of 128,000 are 64 MB.
_SLICE: Final = 128


@dataclass(frozen=True)
class WantedRows:
    """Which token rows of a step somebody wants the final states of, and what for.

    Attributes:
        drawn: steps that get a next token, one row each.
        scored, pooled: steps that want more, or something else.
        rows: token rows: of `drawn`, then of `scored`, then of `pooled`; no row twice.
    """

    drawn: tuple[SequenceStep, ...]
    scored: tuple[SequenceStep, ...]
    pooled: tuple[SequenceStep, ...]
    rows: list[int]

    @classmethod
    def of(cls, steps: Sequence[SequenceStep], ends: Sequence[int]) -> Self:
        """Return the rows of a plan's steps, each of which ends before the token row of `ends`."""
        drawn = [(step, end) for step, end in zip(steps, ends, strict=True) if step.is_drawn]
        rows = [end - 1 for _, end in drawn]
        special = [(s, end) for s, end in zip(steps, ends, strict=True) if s.wants_states]
        scored = [(s, end) for s, end in special if s.scored_positions]
        pooled = [(s, end) for s, end in special if s.pooled_positions]
        for step, end in scored:
            rows += [end - step.position + at for at in step.scored_positions]
        for step, end in pooled:
            rows += [end - step.position + at for at in step.pooled_positions]
        return cls(_steps(drawn), _steps(scored), _steps(pooled), rows)

    @property
    def has_reports(self) -> bool:
        """Somebody wants more than a next token."""
        return bool(self.scored or self.pooled)


def _steps(pairs: Sequence[tuple[SequenceStep, int]]) -> tuple[SequenceStep, ...]:
    return tuple(step for step, _ in pairs)


@dataclass(frozen=True)
class _Scores:
    request_id: str
    logprobs: RowLogprobs
    is_finite: torch.Tensor


@dataclass(frozen=True)
class _Pooled:
    request_id: str
    pooling: Pooling
    values: torch.Tensor
    is_finite: torch.Tensor


@dataclass(frozen=True)
class PromptReports:
    """Tensors of one step, on the device or, from `to_host`, on their way to the host."""

    scores: tuple[_Scores, ...] = ()
    pooled: tuple[_Pooled, ...] = ()

    @classmethod
    def of(cls, wanted: WantedRows, states: FinalStates) -> Self:
        """Enqueue the computation; `states` are not needed behind it.

        Args:
            states: of `wanted.rows`.
        """
        scores: list[_Scores] = []
        at = len(wanted.drawn)
        for step in wanted.scored:
            scores += _score(step, states, at)
            at += len(step.scored_positions)
        pooled: list[_Pooled] = []
        for step in wanted.pooled:
            stop = at + len(step.pooled_positions)
            pooled.append(_pool(step, states.x[at:stop]))
            at = stop
        return cls(tuple(scores), tuple(pooled))

    def to_host(self) -> PromptReports:
        """Enqueue copies to the host; see `copy_from`."""
        return PromptReports(
            tuple(
                _Scores(s.request_id, s.logprobs.to_host(), copy_from(s.is_finite))
                for s in self.scores
            ),
            tuple(
                _Pooled(p.request_id, p.pooling, copy_from(p.values), copy_from(p.is_finite))
                for p in self.pooled
            ),
        )

    def add_to(self, result: StepResult, not_finite: str) -> None:
        """Complete a step's result; to be called on host copies that have arrived.

        Args:
            not_finite: why a request fails whose states or logits are not finite.
        """
        parts: tuple[_Scores | _Pooled, ...] = (*self.scores, *self.pooled)
        for part in parts:
            if not bool(part.is_finite):
                result.failures[part.request_id] = not_finite
                result.tokens.pop(part.request_id, None)
        for scores in self.scores:
            news: tuple[TokenLogprobs, ...] = tuple(scores.logprobs.reports().values())
            before = result.prompt_logprobs.get(scores.request_id, ())
            result.prompt_logprobs[scores.request_id] = before + news
        for pooled in self.pooled:
            values = tuple(pooled.values.tolist())
            if pooled.pooling is Pooling.MEAN:
                result.hidden_sums[pooled.request_id] = values
            else:
                result.embeddings[pooled.request_id] = values


def _score(step: SequenceStep, states: FinalStates, first: int) -> list[_Scores]:
    """Judge the prompt's tokens behind the scored positions, whose rows begin at `first`."""
    prompt, num_top = step.request.prompt_token_ids, step.sampling.prompt_logprobs
    assert num_top is not None, "only who asks is scored"
    scores = []
    positions = step.scored_positions
    for at in range(0, len(positions), _SLICE):
        part = positions[at : at + _SLICE]
        logits = states.logits(first + at, first + at + len(part))
        tokens = torch.tensor(prompt[part.start + 1 : part.stop + 1])
        counts = dict.fromkeys(range(len(part)), num_top)
        logprobs = judge(logits, copy_to(logits.device, tokens), counts)
        is_finite = logits.amax(-1).isfinite().all()
        scores.append(_Scores(step.request_id, logprobs, is_finite))
    return scores


def _pool(step: SequenceStep, x: torch.Tensor) -> _Pooled:
    """Pool a step's states `x`, `[n, H]`."""
    pooling = step.request.pooling
    assert pooling is not None, "only who asks is pooled"
    is_finite = x.isfinite().all()
    if pooling is Pooling.LAST:
        return _Pooled(step.request_id, pooling, x[-1].to(torch.float32, copy=True), is_finite)
    total = torch.zeros(x.shape[1], dtype=torch.int64, device=x.device)
    for rows in torch.split(x, _SLICE):
        total += (rows.double() / HIDDEN_UNIT).round().to(torch.int64).sum(0)
    return _Pooled(step.request_id, pooling, total, is_finite)
