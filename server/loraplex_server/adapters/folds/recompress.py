"""A product of two thin matrices, written again with as few ranks as it has.

Folding puts factors side by side (`[B, -B0] [A; A0]`) which nearly cancel. Rounded to 16 bits as
they are, they would leave the rounding of two large terms in a small difference; written again
from the singular values of the product, they leave only its own.
"""

from __future__ import annotations

from typing import Final

import torch

#: Singular values below this share of the largest are rounding errors of float64.
_RELATIVE_ZERO: Final = 1e-12


def recompress(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return thinner factors of `b @ a`.

        Qb Rb = qr(b),  Qa Ra = qr(a^T),  U S V = svd(Rb Ra^T)
        b' = Qb U sqrt(S),  a' = sqrt(S) V Qa^T,  without the zeros of S

    Args:
        a: `[R, in]`, any float dtype.
        b: `[out, R]`.

    Returns:
        a' `[K, in]` and b' `[out, K]`, float32, computed in float64; K <= R is the rank of the
        product, and at least 1. Factors with NaN or infinity, which nothing decomposes, are given
        back as they are.
    """
    if a.shape[0] == 0:
        return torch.zeros(1, a.shape[1]), torch.zeros(b.shape[0], 1)
    if not (a.isfinite().all() and b.isfinite().all()):
        return a.to(torch.float32), b.to(torch.float32)
    q_b, r_b = torch.linalg.qr(b.to(torch.float64))
    q_a, r_a = torch.linalg.qr(a.to(torch.float64).T)
    u, sigma, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    rank = max(1, int((sigma > _RELATIVE_ZERO * sigma[0]).sum()))
    root = sigma[:rank].sqrt()
    thin_b = q_b @ (u[:, :rank] * root)
    thin_a = (root[:, None] * v[:rank]) @ q_a.T
    return thin_a.to(torch.float32), thin_b.to(torch.float32)
