"""Random choice of tokens that no other row can influence.

Filters in transformers' order, each on what the one before left: temperature, top-k, top-p, min-p.
All are thresholds, so equal probabilities are kept or dropped together, whatever order a sort has.

The draw is the inverse of the cumulative distribution in vocabulary order, at one uniform number
per token that is a pure function of (seed, position). For a row's choice not to depend on its
company to the last bit, only two kinds of operation are used: elementwise ones that IEEE 754 rounds
exactly (a batched `exp` may round a row differently where a SIMD block ends), and reductions along
one row (softmax, cumulative sum, selection).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from loraplex_scheduler.plan import SequenceStep
from loraplex_scheduler.sampling import SamplingParams

#: Below it, a temperature acts like it: the quotients stay finite, the choice is the argmax.
MIN_TEMPERATURE: Final = 1e-5

#: How many of the likeliest tokens are ordered in search of the nucleus of top-p, in turn, before
#: the whole vocabulary is: it is small nearly always, and ordering all is 50 times the cost.
_NUCLEUS_CANDIDATES: Final = (64, 2048)

_MASK64: Final = (1 << 64) - 1
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)


def draw_tokens(logits: torch.Tensor, rows: Sequence[SequenceStep]) -> torch.Tensor:
    """Draw one token per row.

    Args:
        logits: float32 `[N, V]`, edited already.
        rows: one per row of `logits`; temperatures above 0.

    Returns:
        int64 `[N]`.
    """
    probs = filtered_probs(logits, [row.sampling for row in rows])
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    uniform = uniforms([row.sampling.seed for row in rows], [row.position for row in rows])
    target = cumulative[:, -1:] * torch.from_numpy(uniform).to(logits.device)[:, None]
    # The first token whose cumulative sum exceeds the target; the clamp is for NaN logits only.
    index = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return index.clamp_(max=logits.shape[1] - 1)


def filtered_probs(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Return float32 `[N, V]`, proportional to each row's distribution after its filters."""
    temperature = [max(p.temperature, MIN_TEMPERATURE) for p in params]
    scaled = logits - logits.amax(-1, keepdim=True)
    scaled /= logits.new_tensor(temperature)[:, None]
    _mask_top_k(scaled, [p.top_k for p in params])
    probs = scaled.softmax(-1)
    _mask_unlikely(probs, params)
    return probs


def _mask_top_k(scaled: torch.Tensor, top_k: Sequence[int]) -> None:
    """Set what is below a row's k-th largest value to -inf, in place; 0 is off."""
    rows = [i for i, k in enumerate(top_k) if 0 < k < scaled.shape[1]]
    if not rows:
        return
    index = torch.tensor(rows, device=scaled.device)
    kept = torch.tensor([top_k[i] for i in rows], device=scaled.device)[:, None]
    largest = scaled[index].topk(max(top_k[i] for i in rows)).values
    smallest_kept = scaled.new_full((scaled.shape[0], 1), float("-inf"))
    smallest_kept[index] = largest.gather(1, kept - 1)
    scaled.masked_fill_(scaled < smallest_kept, float("-inf"))


def _mask_unlikely(probs: torch.Tensor, params: Sequence[SamplingParams]) -> None:
    """Set what top-p or min-p excludes to 0, in place."""
    nucleus = [i for i, p in enumerate(params) if p.top_p < 1.0]
    if not nucleus and all(p.min_p == 0.0 for p in params):
        return
    floor = probs.amax(-1, keepdim=True) * probs.new_tensor([p.min_p for p in params])[:, None]
    if nucleus:
        top_p = [params[i].top_p for i in nucleus]
        index = torch.tensor(nucleus, device=probs.device)
        floor[index] = torch.maximum(floor[index], _nucleus_floor(probs[index], top_p))
    probs.masked_fill_(probs < floor, 0.0)


def _nucleus_floor(probs: torch.Tensor, top_p: Sequence[float]) -> torch.Tensor:
    """Return the smallest probability inside each nucleus, `[M, 1]`.

    The nucleus is the shortest run of the likeliest tokens whose probabilities reach `top_p`
    (Holtzman et al., arXiv 1904.09751, section 3.1): a token is in while those before it have less.
    """
    wanted = torch.tensor(top_p, dtype=torch.float64, device=probs.device)[:, None]
    floor = torch.empty(probs.shape[0], 1, dtype=probs.dtype, device=probs.device)
    left = torch.arange(probs.shape[0], device=probs.device)
    for size in (*_NUCLEUS_CANDIDATES, probs.shape[1]):
        ordered = probs[left].topk(min(size, probs.shape[1])).values
        floor[left], is_reached = _floor_of_run(ordered, wanted[left])
        left = left[~is_reached]
        if not len(left):
            break
    return floor


def _floor_of_run(ordered: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the last probability of the run `[M, 1]`, and whether it reaches `wanted` `[M]`."""
    cumulative = ordered.cumsum(-1, dtype=torch.float64)
    num_inside = (cumulative - ordered < wanted).sum(-1, keepdim=True).clamp_(min=1)
    return ordered.gather(1, num_inside - 1), cumulative[:, -1] >= wanted[:, 0]


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return one number in `[0, 1)` per (seed, position), float64 `[N]`.

    It is output number `position` of the SplitMix64 generator (Steele et al., OOPSLA 2014, figure
    13) whose state starts at the mix of `seed`, so that neighbouring seeds do not share a stream.
    52 bits: the product with a total is then always below the total.
    """
    seed = np.array([s & _MASK64 for s in seeds], dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    state = _mix(seed) + (position + np.uint64(1)) * _GOLDEN
    return (_mix(state) >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
