"""LoKr (arXiv 2309.14859): the Kronecker product of two small matrices."""

from __future__ import annotations

import torch

from loraplex_server.adapters.folds.factors import Factors, from_dense

_TOLERANCE = 1e-12


def split_matrix(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `[m, R]` and `[R, n]` with the product `w` `[m, n]`, R its rank."""
    u, sigma, v = torch.linalg.svd(w.double(), full_matrices=False)
    rank = int((sigma > _TOLERANCE * sigma[:1]).sum())
    root = sigma[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def fold_kronecker(first: Factors, second: Factors, *, scale: float) -> Factors:
    """Return `scale * (u1 v1) x (u2 v2) = scale * (u1 x u2) (v1 x v2)`.

    Args:
        first, second: pairs of `[m, R]` and `[R, n]`.
    """
    (u1, v1), (u2, v2) = ((u.double(), v.double()) for u, v in (first, second))
    if v1.shape[0] * v2.shape[0] > min(u1.shape[0] * u2.shape[0], v1.shape[1] * v2.shape[1]):
        return from_dense(_kron(u1 @ v1, u2 @ v2) * scale)
    return _kron(v1, v2), _kron(u1, u2) * scale


def _kron(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the Kronecker product of two matrices; `torch.kron` fails for some strides."""
    rows, columns = (m * n for m, n in zip(one.shape, other.shape, strict=True))
    return (one[:, None, :, None] * other[None, :, None, :]).reshape(rows, columns)
