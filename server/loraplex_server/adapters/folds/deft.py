"""DEFT and PaRa: what the weight does in a subspace is removed, and something else injected."""

from __future__ import annotations

from typing import Literal

import torch

from loraplex_server.adapters.folds.factors import Factors

Decomposition = Literal["relu", "qr"]


def fold_deft(
    weight: torch.Tensor,
    p: torch.Tensor,
    injection: torch.Tensor | None,
    *,
    decomposition: Decomposition,
    scale: float,
) -> Factors:
    """Return `Q (scale * R - right^T W)`, where Q, right = P, relu(P), or both an orthonormal P.

    Args:
        weight: of the base `[out, in]`.
        p: `[out, R]`.
        injection: `[R, in]`; None for PaRa, which only removes.
        scale: `alpha / R`, or 1.
    """
    basis, right = _bases(p.double(), decomposition)
    rows = -(right.T @ weight.double())
    if injection is not None:
        rows = rows + injection.double() * scale
    return rows, basis


def _bases(p: torch.Tensor, decomposition: Decomposition) -> tuple[torch.Tensor, torch.Tensor]:
    if decomposition == "relu":
        return p, p.relu()
    # Householder QR: the signs of its columns are those of PEFT's, which is in float32.
    q = torch.linalg.qr(p).Q
    return q, q
