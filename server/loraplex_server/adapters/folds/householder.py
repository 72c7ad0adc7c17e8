"""HRA (arXiv 2405.17484): the weight times a chain of reflections, `W prod_i (I - 2 u_i u_i^T)`.

The compact WY form of the product (Schreiber and Van Loan, 1989) is `I - U T U^T` with T upper
triangular, so the update `-(W U) T U^T` has the number of reflections as its rank.
"""

from __future__ import annotations

import torch

from loraplex_server.adapters.folds.factors import Factors


def fold_reflections(weight: torch.Tensor, u: torch.Tensor) -> Factors:
    """Args:
    weight: of the base `[out, in]`.
    u: one vector of each reflection in a column, of any length but 0: `[in, R]`.
    """
    unit = u.double() / u.double().norm(dim=0)
    rank = unit.shape[1]
    t = torch.zeros(rank, rank, dtype=torch.float64)
    for i in range(rank):
        t[i, i] = 2.0
        t[:i, i] = -2.0 * (t[:i, :i] @ (unit[:, :i].T @ unit[:, i]))
    return unit.T.contiguous(), -(weight.double() @ unit) @ t


def fold_orthogonal_reflections(weight: torch.Tensor, u: torch.Tensor) -> Factors:
    """The same after Gram-Schmidt (`apply_GS`): the reflections commute and T is `2 I`."""
    columns: list[torch.Tensor] = []
    for vector in u.double().T:
        for known in columns:
            vector = vector - (known @ vector) * known
        columns.append(vector / vector.norm())
    unit = torch.stack(columns, dim=1)
    return unit.T.contiguous(), -2.0 * (weight.double() @ unit)
