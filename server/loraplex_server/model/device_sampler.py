"""Sampling where the logits are, without a host round trip: parameters in, tokens out, no wait.

The same choice as `sampler.sample`, by `loraplex_kernels.sampling_triton` (which this file imports,
and triton with it). Tables and results lie at fixed addresses, so that a CUDA graph can hold the
launch: fill, replay, collect. Rows that edit their logits or report log probabilities need more
than a captured launch can hold; `sample` takes any rows.

Uniform numbers are computed on the host: they depend on nothing but seed and position, which are
known before the step is launched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from loraplex_kernels.sampling_triton import TABLE_FIELDS, SamplingScratch, sample_rows
from loraplex_scheduler.plan import SampledToken, SequenceStep, StepResult
from loraplex_server.model.device_copy import copy_from, copy_to
from loraplex_server.model.draw import uniforms
from loraplex_server.model.logit_edits import edit_logits
from loraplex_server.model.sampler import RowLogprobs, take_logprobs
from loraplex_server.model.token_masks import GrammarMasks, mask_rows


@dataclass(frozen=True)
class SampledTokens:
    """What one step sampled, on the device or, from `to_host`, on its way to the host.

    Attributes:
        rows: whose tokens these are.
        outcome: int64 `[2, S]`: the tokens; then 1 for a row whose logits are finite, else 0. On
            the device it is the sampler's own memory: the next launch writes over it.
        logprobs: of the rows that asked, if any did.
        failures: why rows may choose nothing, by their index.
    """

    rows: tuple[SequenceStep, ...]
    outcome: torch.Tensor
    logprobs: RowLogprobs | None = None
    failures: Mapping[int, str] = field(default_factory=dict)

    @property
    def tokens(self) -> torch.Tensor:
        """int64 `[S]`; some valid id where a row is not finite."""
        return self.outcome[0]

    def to_host(self) -> SampledTokens:
        """Enqueue copies to pinned memory on the current stream.

        They hold nothing before an event recorded behind them has completed.
        """
        logprobs = self.logprobs and self.logprobs.to_host()
        return SampledTokens(self.rows, copy_from(self.outcome), logprobs, self.failures)

    def result(self, not_finite: str) -> StepResult:
        """Return the tokens by request id; to be called on host copies that have arrived.

        Args:
            not_finite: why a request fails whose logits are not finite.
        """
        tokens, is_finite = self.outcome.tolist()
        reports = self.logprobs.reports() if self.logprobs else {}
        sampled: dict[str, SampledToken] = {}
        failures: dict[str, str] = {}
        for i, row in enumerate(self.rows):
            if not is_finite[i]:
                failures[row.request_id] = not_finite
            elif i in self.failures:
                failures[row.request_id] = self.failures[i]
            else:
                sampled[row.request_id] = SampledToken(tokens[i], reports.get(i))
        return StepResult(sampled, failures)


class DeviceSampler:
    """Owned by the runner; everything it does is enqueued on the current stream.

    Args:
        max_rows: most rows of one launch.
        device: where the logits are.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._table = torch.zeros(len(TABLE_FIELDS), max_rows, dtype=torch.float64, device=device)
        self._outcome = torch.zeros(2, max_rows, dtype=torch.int64, device=device)
        self._scratch = SamplingScratch(max_rows, device)

    @property
    def tokens(self) -> torch.Tensor:
        """int64 `[max_rows]`, what the last launch chose; always the same memory."""
        return self._outcome[0]

    @staticmethod
    def is_plain(rows: Sequence[SequenceStep]) -> bool:
        """No row edits its logits or reports log probabilities: a captured launch is enough."""
        return not any(
            row.banned_token_ids
            or row.sampling.restricts_tokens
            or row.sampling.logit_bias
            or row.sampling.has_penalties
            or row.sampling.logprobs is not None
            for row in rows
        )

    def fill(self, rows: Sequence[SequenceStep]) -> None:
        """Enqueue the parameters of the next launch; rows beyond these are greedy."""
        host = np.zeros(self._table.shape)
        if not all(row.sampling.is_greedy for row in rows):
            chosen = [row.sampling for row in rows]
            host[:4, : len(rows)] = np.array(
                [(p.temperature, p.top_k, p.top_p, p.min_p) for p in chosen]
            ).T
            host[4, : len(rows)] = uniforms([p.seed for p in chosen], [r.position for r in rows])
        self._table.copy_(copy_to(self._table.device, torch.from_numpy(host)))

    def launch(self, logits: torch.Tensor) -> None:
        """Choose a token of each row by the parameters filled in; may be captured in a graph.

        Args:
            logits: float32 `[S, V]`; not changed.
        """
        sample_rows(logits, self._table, self._outcome, self._scratch)

    def collect(self, rows: Sequence[SequenceStep]) -> SampledTokens:
        """Return what the last launch chose for its first rows."""
        return SampledTokens(tuple(rows), self._outcome[:, : len(rows)])

    @torch.inference_mode()
    def sample(
        self,
        logits: torch.Tensor,
        rows: Sequence[SequenceStep],
        grammars: GrammarMasks | None = None,
    ) -> SampledTokens:
        """Choose a token of each row, with all that rows can ask for.

        Args:
            logits: float32 `[S, V]`; not changed.
            rows: one per row of `logits`. All token ids they name are below `V`.
            grammars: those of the rows that have one.
        """
        assert logits.shape[0] == len(rows), "one row of logits per sequence"
        masks = mask_rows(rows, logits.shape[1], grammars)
        edited = edit_logits(logits, rows, masks)
        self.fill(rows)
        self.launch(edited)
        sampled = self.collect(rows)
        if edited is not logits and rows:  # a row fails for its logits, not for its edits
            sampled.outcome[1] = logits.amax(-1).isfinite()
        return SampledTokens(
            sampled.rows,
            sampled.outcome,
            take_logprobs(logits, rows, sampled.tokens),
            masks.failures,
        )
