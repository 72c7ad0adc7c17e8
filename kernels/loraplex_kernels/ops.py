"""The operations the model calls; this file alone chooses an implementation.

Signatures and meaning are those of `reference`.
"""

from __future__ import annotations

import torch

from loraplex_kernels import cpu
from loraplex_kernels.batch import AttentionBatch, LoRABatch
from loraplex_kernels.reference import write_kv

__all__ = ["add_lora", "paged_attention", "write_kv"]


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    pool_layer: torch.Tensor,
    batch: LoRABatch,
    *,
    layer: int,
    projections: tuple[int, ...],
    out_features: tuple[int, ...],
) -> None:
    """Add the LoRA delta of one site to `y` in place; see `reference.add_lora`."""
    cpu.add_lora(
        y, x, pool_layer, batch, layer=layer, projections=projections, out_features=out_features
    )


def paged_attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Attend over paged KV; see `reference.paged_attention`."""
    return cpu.paged_attention(query, kv, batch, scale=scale, window=window)
