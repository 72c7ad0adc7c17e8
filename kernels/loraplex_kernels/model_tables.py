"""What the kernels are told once, when an engine is built: about its model and its largest step."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LoRASite:
    """Projections of a layer that share an input, and so one pair of launches.

    Attributes:
        index: position in the order qkv, o, gate_up, down.
        projections: indices in the order q k v o gate up down.
        in_features: width of the input.
        out_features: output width of each of them; their sum is the width of the output.
        is_row_parallel: where the model is cut over devices, each has a summand of the site's
            output, and `out_features` are the columns whose updates are in its summand.
    """

    index: int
    projections: tuple[int, ...]
    in_features: int
    out_features: tuple[int, ...]
    is_row_parallel: bool = False


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
    """Weights of the RMSNorm of each query and key head (Qwen3): `[head_dim]` of all tokens, or
    `[T, head_dim]`, both alike.
    """

    q: torch.Tensor
    k: torch.Tensor


@dataclass(frozen=True)
class KernelModel:
    """Sizes of a model and its pool, as far as compiled kernels depend on them.

    Attributes:
        page_tokens: tokens of a page.
        page_elems, chunk_elems: see `PoolLayout` in the memory package.
        sites: the LoRA sites of a layer, in the order of their `index`.
        dtype: of weights, activations and pool.
        num_ranks: devices that the model is cut over; all sizes are those of one's part.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_tokens: int
    page_elems: int
    chunk_elems: int
    sites: tuple[LoRASite, ...]
    dtype: torch.dtype
    num_ranks: int = 1


@dataclass(frozen=True)
class StepCapacity:
    """The largest step: what static tables and scratch are made for.

    Attributes:
        max_tokens: most token rows.
        max_sequences: most sequences.
        max_pages: most page ids in the block tables of all sequences together.
        plane_elems: float32 elements between LoRA's two launches.
    """

    max_tokens: int
    max_sequences: int
    max_pages: int
    plane_elems: int = 1 << 24
