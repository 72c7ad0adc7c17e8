"""GraLoRA (arXiv 2505.20355): k x k blocks, each with a low-rank update of its own.

Input block n is multiplied by A_n to R numbers; the j-th R / k of these go to output block j. So
the whole is one pair at rank `k R`: rows of A are block-diagonal, and B permutes.
"""

from __future__ import annotations

import torch

from loraplex_server.adapters.folds.factors import Factors


def fold_gralora(a: torch.Tensor, b: torch.Tensor, *, scale: float) -> Factors:
    """Args:
    a: `[k, in / k, R]`.
    b: `[k, R, out / k]`.
    scale: `alpha / (R + hybrid_r)`.
    """
    (k, in_block, rank), out_block = a.shape, b.shape[2]
    share = rank // k
    rows = torch.zeros(k, rank, k, in_block, dtype=torch.float64)
    # Number n R + j share + q goes to output block j, by row n share + q of its B.
    columns = torch.zeros(k, out_block, k, k, share, dtype=torch.float64)
    for block in range(k):
        rows[block, :, block] = a[block].T
        columns[block, :, :, block] = b[block].T.reshape(out_block, k, share)
    return rows.reshape(k * rank, -1), columns.reshape(-1, k * rank) * scale
