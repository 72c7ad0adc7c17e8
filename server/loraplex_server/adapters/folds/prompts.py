"""Virtual tokens: soft prompts, and prefixes of keys and values."""

from __future__ import annotations

import torch


def fold_multitask_prompt(
    shared: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """Return one task's prompt `[n, H]` (MPT, arXiv 2303.02861): shared, times a low-rank matrix.

    Args:
        shared: `[n, H]`.
        columns: of the task, `[n, K]`.
        rows: of the task, `[K, H]`.
    """
    return shared.double() * (columns.double() @ rows.double())


def split_prefix(prefix: torch.Tensor, num_layers: int) -> list[torch.Tensor]:
    """Return each layer's `[n, 2 * kv_heads * head_dim]`, K first, of a prefix as PEFT stores it.

    A token's row is K of layer 0, V of layer 0, K of layer 1, and so on, heads in order.

    Args:
        prefix: `[n, num_layers * 2 * kv_heads * head_dim]`.
    """
    return [layer.contiguous() for layer in prefix.chunk(num_layers, dim=1)]
