"""DeLoRA (arXiv 2503.18225): the strength of the update is trained apart from its directions."""

from __future__ import annotations

import torch

from loraplex_server.adapters.folds.factors import Factors

#: PEFT's floor below the norms of rows and columns.
_FLOOR = 1e-4


def fold_delora(
    a: torch.Tensor, b: torch.Tensor, strength: torch.Tensor, weight_norm: torch.Tensor
) -> Factors:
    """Return `B diag(strength / (R |a_i| |b_i|)) A diag(weight_norm)`.

    Args:
        a: `[R, in]`.
        b: `[out, R]`.
        strength: `delora_lambda`, `[1]`.
        weight_norm: norms of the columns of the base weight when training began, `[in]`.
    """
    rows, columns = a.double(), b.double()
    norms = rows.norm(dim=1).clamp(min=_FLOOR) * columns.norm(dim=0).clamp(min=_FLOOR)
    diagonal = strength.double() / len(a) / norms
    return rows * weight_norm.double(), columns * diagonal
