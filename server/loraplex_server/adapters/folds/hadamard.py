"""LoHa (arXiv 2108.06098): the element-wise product of two low-rank matrices."""

from __future__ import annotations

import torch

from loraplex_server.adapters.folds.factors import Factors


def fold_hadamard(
    first: tuple[torch.Tensor, torch.Tensor],
    second: tuple[torch.Tensor, torch.Tensor],
    *,
    scale: float,
) -> Factors:
    """Return `scale * (a1 b1) * (a2 b2)` at the product of the ranks.

    `(sum_i a1_i b1_i) * (sum_j a2_j b2_j) = sum_ij (a1_i * a2_j) (b1_i * b2_j)`.

    Args:
        first, second: pairs of `[out, R]` and `[R, in]`.
    """
    (a1, b1), (a2, b2) = ((a.double(), b.double()) for a, b in (first, second))
    rows = b1[:, None, :] * b2[None, :, :]
    columns = a1[:, :, None] * a2[:, None, :]
    return rows.flatten(0, 1), columns.flatten(1, 2) * scale
