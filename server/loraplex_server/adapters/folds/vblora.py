"""VB-LoRA (arXiv 2405.15179): rows and columns put together from a bank of vectors.

Each piece of A and of B is a mixture of the `k` vectors of the bank with the largest logits. Files
hold the logits, or only the chosen indices with all weights but the last.
"""

from __future__ import annotations

import torch

from loraplex_server.adapters.folds.factors import Factors


def top_k_weights(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return indices and mixture weights `[..., k]` of logits `[..., N]`."""
    top, indices = logits.double().topk(k, dim=-1)
    return indices, top.softmax(dim=-1)


def complete_weights(stored: torch.Tensor) -> torch.Tensor:
    """Return `[..., k]` mixture weights from the first `k - 1`: they add up to 1."""
    weights = stored.double()
    return torch.cat((weights, 1.0 - weights.sum(-1, keepdim=True)), dim=-1)


def mix(bank: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return pieces `[..., V]` mixed from `bank` `[N, V]` by `[..., k]` indices and weights."""
    vectors, shares = bank.double(), weights.double()
    pieces = torch.zeros(*indices.shape[:-1], bank.shape[1], dtype=torch.float64)
    # One after the other: all k at once would take k times the memory of the result.
    for rank in range(indices.shape[-1]):
        pieces += shares[..., rank, None] * vectors[indices[..., rank].long()]
    return pieces


def fold_vblora(a_pieces: torch.Tensor, b_pieces: torch.Tensor) -> Factors:
    """Args:
    a_pieces: `[R, in / V, V]`.
    b_pieces: `[out / V, R, V]`.
    """
    rank = a_pieces.shape[0]
    return a_pieces.reshape(rank, -1), b_pieces.transpose(1, 2).reshape(-1, rank)
