"""MiSS, formerly Bone (arXiv 2409.15371): inputs are summed in R groups, then multiplied by D."""

from __future__ import annotations

import torch

from loraplex_server.adapters.folds.factors import Factors


def fold_miss(block: torch.Tensor, *, num_in: int, num_out: int) -> Factors:
    """Return A of zeros and ones, `A[j, i] = (i mod R == j)`, and `B = D^T`.

    Args:
        block: D `[R, out]`, or `[R, M]` ("mini"), repeated along the outputs.
    """
    rank, columns = block.shape
    a = torch.zeros(rank, num_in, dtype=torch.float64)
    inputs = torch.arange(num_in)
    a[inputs % rank, inputs] = 1.0
    return a, block.double().repeat(1, num_out // columns).T.contiguous()
