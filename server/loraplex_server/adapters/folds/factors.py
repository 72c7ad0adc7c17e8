"""An update of one linear as two thin matrices, and weighted sums of such updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

#: A `[R, in]` and B `[out, R]`: the update is `B A`, all scales folded in. Of folds, float64;
#: of variants of LoRA, float32, as PEFT computes them.
Factors: TypeAlias = tuple[torch.Tensor, torch.Tensor]


def from_dense(update: torch.Tensor) -> Factors:
    """Return a whole update `[out, in]` as a pair at the rank of its shorter side."""
    num_out, num_in = update.shape
    unit = torch.eye(min(num_out, num_in), dtype=torch.float64)
    return (unit, update.double()) if num_in <= num_out else (update.double(), unit)


def stack(updates: Sequence[Factors], weights: Sequence[float] | None = None) -> Factors:
    """Return the sum of updates, each times its weight: A below A, B beside weighted B.

    This is PEFT's `add_weighted_adapter(combination_type="cat")`, and how federated LoRA is
    averaged without mixing factors (FLoRA, arXiv 2409.05976, section 3): the rank is the sum of
    the ranks, and nothing is approximated.

    Args:
        updates: of one linear; scales already in B.
        weights: one for each; by default 1.
    """
    chosen = [1.0] * len(updates) if weights is None else list(weights)
    rows = [a.double() for a, _ in updates]
    columns = [b.double() * weight for (_, b), weight in zip(updates, chosen, strict=True)]
    return torch.cat(rows), torch.cat(columns, dim=1)
