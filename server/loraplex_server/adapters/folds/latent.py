"""A small trained matrix between two fixed ones: LoRA-XS, LoRA-SB, TinyLoRA."""

from __future__ import annotations

import torch

from loraplex_server.adapters.folds.factors import Factors


def fold_latent(
    a: torch.Tensor, b: torch.Tensor, r: torch.Tensor, *, scale: float = 1.0
) -> Factors:
    """Return `scale * B R A` (LoRA-XS, arXiv 2405.17604; LoRA-SB, arXiv 2411.19557).

    Args:
        a: `[R, in]`.
        b: `[out, R]`.
        r: `[R, R]`.
    """
    return a.double(), b.double() @ r.double() * scale


def tiny_latent(v: torch.Tensor, projections: torch.Tensor) -> torch.Tensor:
    """Return TinyLoRA's matrix `sum_i v_i P_i` (arXiv 2602.04118) of `v` `[U]`, P `[U, R, R]`."""
    return torch.einsum("u,ujk->jk", v.double(), projections.double())


def draw_tiny_projections(seed: int, *, num_vectors: int, rank: int) -> torch.Tensor:
    """Draw P `[U, R, R]`, float32, as PEFT does: normal, variance `1 / R`.

    Args:
        seed: `projection_seed` plus the index of the linear among all that have the adapter.
    """
    generator = torch.Generator().manual_seed(seed)
    size = (num_vectors, rank, rank)
    return torch.normal(mean=0.0, std=1.0 / (rank**0.5), size=size, generator=generator)


def tied_group(index: int, num_linears: int, weight_tying: float) -> int:
    """Return which of TinyLoRA's vectors the linear at `index` uses.

    Args:
        weight_tying: 0 is one vector for each linear, 1 one for all.
    """
    num_groups = max(1, round(num_linears * (1.0 - weight_tying)))
    return min(index // max(1, num_linears // num_groups), num_groups - 1)
