"""From logits to tokens: the order of steps, the greedy fast path, and the log probabilities.

1. Log probabilities are taken of the raw logits, before any edit or filter (as vLLM reports them).
2. Masks, bias and penalties: `logit_edits.py`.
3. Greedy rows take the argmax, the lowest id of equals. The others draw: `draw.py`.

A row's token and its log probabilities depend on its own logits, parameters and position only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from loraplex_kernels.row_max import row_max
from loraplex_scheduler.plan import SampledToken, SequenceStep, TokenLogprobs
from loraplex_server.model.device_copy import copy_from, copy_to
from loraplex_server.model.draw import draw_tokens
from loraplex_server.model.logit_edits import edit_logits
from loraplex_server.model.token_masks import TokenMasks, mask_rows

#: Most that `SamplingParams.logprobs` allows. Always so many are selected, so that which of equal
#: ones are listed does not depend on what other rows ask for.
_MAX_LOGPROBS: Final = 20


@torch.inference_mode()
def sample(
    logits: torch.Tensor, rows: Sequence[SequenceStep], masks: TokenMasks | None = None
) -> list[SampledToken]:
    """Choose the next token of each row.

    Args:
        logits: float32 `[N, V]`; not changed.
        rows: one per row of `logits`. All token ids they name (bias, bans, history) are below `V`;
            the door checks that.
        masks: what they may choose; None where no row has a grammar.

    Returns:
        One token per row, with log probabilities where the row asks for them.
    """
    if not rows:
        return []
    assert logits.shape[0] == len(rows), "one row of logits per sequence"
    edited = edit_logits(logits, rows, masks or mask_rows(rows, logits.shape[1]))
    drawn = [i for i, row in enumerate(rows) if not row.sampling.is_greedy]
    if len(drawn) == len(rows):
        tokens = draw_tokens(edited, rows)
    else:
        tokens = row_max(edited)[1]
        if drawn:
            index = torch.tensor(drawn, device=logits.device)
            tokens[index] = draw_tokens(edited[index], [rows[i] for i in drawn])
    taken = take_logprobs(logits, rows, tokens)
    reports = taken.reports() if taken else {}
    return [SampledToken(token, reports.get(i)) for i, token in enumerate(tokens.tolist())]


@dataclass(frozen=True)
class RowLogprobs:
    """The log probabilities of the rows that asked, still tensors on any device.

    Attributes:
        counts: how many of the likeliest each row lists, by row index, in the order of the tensors.
        chosen: of the tokens that were chosen, float32 `[M]`.
        top_ids: the likeliest tokens, int64 `[M, K]`.
        top: their log probabilities, float32 `[M, K]`.
    """

    counts: dict[int, int]
    chosen: torch.Tensor
    top_ids: torch.Tensor
    top: torch.Tensor

    def to_host(self) -> RowLogprobs:
        """Enqueue copies to the host; see `copy_from`."""
        return RowLogprobs(
            self.counts, copy_from(self.chosen), copy_from(self.top_ids), copy_from(self.top)
        )

    def reports(self) -> dict[int, TokenLogprobs]:
        """Return what each row reports, by row index; waits for the tensors."""
        pairs = zip(self.top_ids.tolist(), self.top.tolist(), strict=True)
        return {
            i: TokenLogprobs(logprob, tuple(zip(ids[:count], values[:count], strict=True)))
            for (i, count), logprob, (ids, values) in zip(
                self.counts.items(), self.chosen.tolist(), pairs, strict=True
            )
        }


def take_logprobs(
    logits: torch.Tensor, rows: Sequence[SequenceStep], tokens: torch.Tensor
) -> RowLogprobs | None:
    """Compute the log probabilities of the rows that ask; waits for nothing.

    Args:
        logits: float32 `[N, V]`, before any edit.
        rows: one per row of `logits`.
        tokens: int64 `[N]`, what was chosen.
    """
    counts = {
        i: row.sampling.logprobs for i, row in enumerate(rows) if row.sampling.logprobs is not None
    }
    if not counts:
        return None
    index = copy_to(logits.device, torch.tensor(list(counts)))
    return judge(logits[index], tokens[index], counts)


def judge(logits: torch.Tensor, tokens: torch.Tensor, counts: dict[int, int]) -> RowLogprobs:
    """Compute the log probabilities of a token in each row; waits for nothing.

    Args:
        logits: float32 `[M, V]`.
        tokens: int64 `[M]`.
        counts: as `RowLogprobs.counts`, of as many rows.
    """
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, tokens[:, None]).squeeze(1)
    top = logprobs.topk(min(_MAX_LOGPROBS, logits.shape[1]))
    return RowLogprobs(counts, chosen, top.indices, top.values)
