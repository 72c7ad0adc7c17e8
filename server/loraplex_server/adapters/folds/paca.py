"""PaCA (arXiv 2503.01905): some columns of the weight are trained and replaced."""

from __future__ import annotations

import torch

from loraplex_server.adapters.folds.factors import Factors


def fold_paca(
    weight: torch.Tensor, columns: torch.Tensor, indices: torch.Tensor, *, scale: float
) -> Factors:
    """Return `W[:, indices] := scale * columns` as a pair at the number of columns.

    Args:
        weight: of the base `[out, in]`.
        columns: what the file holds, `[out, R]`: whole columns, not differences.
        indices: distinct inputs, of any integer dtype, `[R]`.
    """
    rank, indices = len(indices), indices.long()
    a = torch.zeros(rank, weight.shape[1], dtype=torch.float64)
    a[torch.arange(rank), indices] = 1.0
    return a, columns.double() * scale - weight.double()[:, indices]
