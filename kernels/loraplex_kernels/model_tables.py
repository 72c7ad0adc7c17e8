"""What a model tells the kernels once, at construction: its LoRA sites, its rotation, its norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LoRASite:
    """Projections of a layer that share an input, and so one pair of launches.

    Attributes:
        index: position in the order qkv, o, gate_up, down.
        projections: indices in the order q k v o gate up down.
        out_features: output width of each of them; their sum is the width of the output.
    """

    index: int
    projections: tuple[int, ...]
    out_features: tuple[int, ...]


@dataclass(frozen=True)
class RopeTable:
    """Cos and sin of every position, in the model's dtype: `[max_model_len, rot_dim]` each.

    `sin` carries the sign of the half rotation: its first half is negated, so that
    `rotate(x) = x * cos + roll(x, rot_dim / 2) * sin`.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin `[T, 1, rot_dim]` of integer `positions` `[T]`."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


@dataclass(frozen=True)
class HeadNorms:
    """Weights `[head_dim]` of the RMSNorm of each query and key head (Qwen3)."""

    q: torch.Tensor
    k: torch.Tensor
