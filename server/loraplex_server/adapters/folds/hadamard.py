"""LoHa (arXiv 2108.06098): the element-wise product of two low-rank matrices."""

from __future__ import annotations

import torch

from loraplex_server.adapters.folds.factors import Factors, from_dense


def fold_hadamard(
    first: tuple[torch.Tensor, torch.Tensor],
    second: tuple[torch.Tensor, torch.Tensor],
    *,
    scale: float,
) -> Factors:
    """Return `scale * (a1 b1) * (a2 b2)` at the product of the ranks, or of the shorter side.

    `(sum_i a1_i b1_i) * (sum_j a2_j b2_j) = sum_ij (a1_i * a2_j) (b1_i * b2_j)`.

    Args:
        first, second: pairs of `[out, R]` and `[R, in]`.
    """
    (a1, b1), (a2, b2) = ((a.double(), b.double()) for a, b in (first, second))
    if a1.shape[1] * a2.shape[1] > min(a1.shape[0], b1.shape[1]):
        return from_dense((a1 @ b1) * (a2 @ b2) * scale)
    rows = b1[:, None, :] * b2[None, :, :]
    columns = a1[:, :, None] * a2[:, None, :]
    return rows.flatten(0, 1), columns.flatten(1, 2) * scale
