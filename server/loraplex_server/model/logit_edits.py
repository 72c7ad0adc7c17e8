"""What a request asks to change about the logits before a token is chosen.

In this order, each step on the result of the one before (vLLM's order):

1. what a row may not choose becomes -inf: by its grammar, `allowed_token_ids`, `bad_words` or
   `min_tokens` (`token_masks.py`);
2. `logit_bias` is added;
3. repetition penalty, over the tokens of prompt and output: a positive logit is divided by it, a
   negative one multiplied (CTRL, arXiv 1909.05858, section 4.1, as in transformers);
4. presence and frequency penalty, over the tokens of the output: `presence + frequency * count` is
   subtracted (OpenAI's definition).

Every edit but a whole mask touches single elements, so the cost follows the tokens named, not the
vocabulary, and no row can change another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from loraplex_scheduler.plan import SequenceStep
from loraplex_server.model.device_copy import copy_to
from loraplex_server.model.token_masks import TokenMasks

_Keys = npt.NDArray[np.int64]


def edit_logits(
    logits: torch.Tensor, rows: Sequence[SequenceStep], masks: TokenMasks
) -> torch.Tensor:
    """Apply each row's masks, bias and penalties.

    Args:
        logits: float32 `[N, V]`; not changed.
        rows: one per row of `logits`; all token ids in them are below `V`.
        masks: what they may choose.

    Returns:
        `logits` itself when no row asks for anything, else an edited copy.
    """
    biased = [(i, row) for i, row in enumerate(rows) if row.sampling.logit_bias]
    penalised = [(i, row) for i, row in enumerate(rows) if row.sampling.has_penalties]
    if not (biased or masks.banned or masks.allowed or penalised):
        return logits
    edited = logits.clone(memory_format=torch.contiguous_format)
    flat, vocab = edited.view(-1), logits.shape[1]
    if masks.allowed:
        index = copy_to(flat.device, torch.tensor(list(masks.allowed)))
        allowed = copy_to(flat.device, torch.from_numpy(np.stack(list(masks.allowed.values()))))
        edited[index] = edited[index].masked_fill_(~allowed, float("-inf"))
    if masks.banned:
        keys = [i * vocab + token for i, tokens in masks.banned.items() for token in tokens]
        flat[copy_to(flat.device, torch.tensor(keys))] = float("-inf")
    if biased:
        keys = [i * vocab + token for i, row in biased for token in row.sampling.logit_bias]
        values = list(chain.from_iterable(row.sampling.logit_bias.values() for _, row in biased))
        bias = copy_to(flat.device, torch.tensor(values, dtype=flat.dtype))
        flat[copy_to(flat.device, torch.tensor(keys))] += bias
    if penalised:
        _penalise(flat, vocab, penalised)
    return edited


def _penalise(
    flat: torch.Tensor, vocab: int, penalised: Sequence[tuple[int, SequenceStep]]
) -> None:
    """Apply the penalties to `flat`, float32 `[N * V]`, in place."""
    seen = np.concatenate([_keys(i, vocab, row.history) for i, row in penalised])
    output = np.concatenate(
        [_keys(i, vocab, row.history[row.num_prompt_text :]) for i, row in penalised]
    )
    num_rows = flat.shape[0] // vocab
    table = np.zeros((3, num_rows), dtype=np.float32)
    for i, row in penalised:
        sampling = row.sampling
        table[:, i] = (
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        )
    keys = np.unique(seen)
    repetition = copy_to(flat.device, torch.from_numpy(table[0][keys // vocab]))
    index = copy_to(flat.device, torch.from_numpy(keys))
    values = flat[index]
    flat[index] = torch.where(values > 0, values / repetition, values * repetition)
    keys, counts = np.unique(output, return_counts=True)
    subtract = table[1][keys // vocab] + table[2][keys // vocab] * counts.astype(np.float32)
    index = copy_to(flat.device, torch.from_numpy(keys))
    flat[index] -= copy_to(flat.device, torch.from_numpy(subtract))


def _keys(index: int, vocab: int, tokens: Iterable[int]) -> _Keys:
    """Return where row `index` holds the logits of `tokens`, int64, in the flattened logits."""
    return index * vocab + np.fromiter(tokens, dtype=np.int64)
