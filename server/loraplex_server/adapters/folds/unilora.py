"""Uni-LoRA (arXiv 2506.00799): every element of A and B is one of few shared numbers, scaled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from loraplex_server.adapters.folds.factors import Factors


@dataclass(frozen=True)
class Assignment:
    """Which shared number stands where in one linear, and its scale.

    Attributes:
        a_indices: `[R, in]`, of any integer dtype.
        b_indices: `[out, R]`, likewise.
        a_scales, b_scales: of the same shapes, float32.
    """

    a_indices: torch.Tensor
    b_indices: torch.Tensor
    a_scales: torch.Tensor
    b_scales: torch.Tensor


def fold_unilora(theta: torch.Tensor, assignment: Assignment) -> Factors:
    """Args:
    theta: the shared numbers `[N]`.
    """
    shared = theta.double()
    a = shared[assignment.a_indices.long()] * assignment.a_scales.double()
    b = shared[assignment.b_indices.long()] * assignment.b_scales.double()
    return a, b


def draw_assignments(
    shapes: Sequence[tuple[int, int]], *, rank: int, length: int, seed: int
) -> list[Assignment]:
    """Assign shared numbers to all linears again, as PEFT does from `seed`.

    Each number is used equally often, up to one; its scale is one over the root of how often.

    Args:
        shapes: `(in, out)` of every linear that has the adapter, in the model's order.
        length: how many shared numbers there are.
    """
    count = sum(rank * (num_in + num_out) for num_in, num_out in shapes)
    indices = _balanced_indices(count, length, seed)
    counts = torch.bincount(indices, minlength=length).float()
    scales = torch.where(counts > 0, counts.rsqrt(), 0.0)
    assignments, at = [], 0
    for num_in, num_out in shapes:
        a = indices[at : at + rank * num_in].view(rank, num_in)
        at += a.numel()
        b = indices[at : at + rank * num_out].view(num_out, rank)
        at += b.numel()
        assignments.append(Assignment(a, b, scales[a], scales[b]))
    return assignments


def _balanced_indices(count: int, length: int, seed: int) -> torch.Tensor:
    """Return `count` shuffled indices below `length`, int64: PEFT's `generate_index`."""
    rng = np.random.default_rng(seed)
    each, rest = divmod(count, length)
    data = np.repeat(np.arange(length), each)
    if rest > 0:
        data = np.concatenate([data, rng.choice(length, size=rest, replace=False)])
    rng.shuffle(data)
    return torch.as_tensor(data, dtype=torch.int64)
