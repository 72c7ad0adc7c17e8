"""The formulas of LoRA's variants, in float32 exactly where PEFT 0.21 computes them in float32."""

from __future__ import annotations

import torch

from loraplex_server.adapters.folds.factors import Factors


def pissa_init(weight: torch.Tensor, rank: int, scale: float) -> Factors:
    """Return PiSSA's initial A and B of a base weight (`LoraLayer.pissa_init`).

        U S V = svd(W),  A0 = sqrt(S / s) V,  B0 = U sqrt(S / s),  of the largest `rank` values

    Args:
        weight: `[out, in]` float32.
    """
    u, sigma, v = torch.linalg.svd(weight, full_matrices=False)
    root = torch.diag(torch.sqrt(sigma[:rank] / scale))
    return root @ v[:rank], u[:, :rank] @ root


def olora_init(weight: torch.Tensor, rank: int) -> Factors:
    """Return OLoRA's initial A and B of a base weight: `Q R = qr(W)` cut to `rank`."""
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


def without_init(update: Factors, initial: Factors, scale: float) -> Factors:
    """Return `s (B A - B0 A0)`: what was trained on `W - s B0 A0`, as an update of W."""
    (a, b), (a0, b0) = update, initial
    return torch.cat((a, a0)), scale * torch.cat((b, -b0), dim=1)


def kasa(update: Factors, diagonal: torch.Tensor, weight: torch.Tensor, scale: float) -> Factors:
    """Return KaSA's update: `s B diag(d) A`, less the smallest `R` singular values of the base.

    Args:
        diagonal: `[R]`.
        weight: `[out, in]` float32, of the base.
    """
    a, b = update
    kept = min(weight.shape) - a.shape[0]
    u, sigma, v = torch.linalg.svd(weight, full_matrices=False)
    dropped = u[:, kept:] * sigma[kept:]
    return torch.cat((a, v[kept:])), torch.cat((scale * b * diagonal, -dropped), dim=1)


def block_diagonal(stacked: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Return BD-LoRA's blocks, stored above each other, on the diagonal.

    Args:
        stacked: `[rows, columns / num_blocks]`.
    """
    blocks = torch.chunk(stacked, num_blocks)
    rows, columns = blocks[0].shape
    whole = stacked.new_zeros(len(blocks) * rows, len(blocks) * columns)
    for at, block in enumerate(blocks):
        whole[at * rows : (at + 1) * rows, at * columns : (at + 1) * columns] = block
    return whole


def ungroup(a: torch.Tensor, in_features: int) -> torch.Tensor:
    """Return QA-LoRA's A for inputs that are not pooled.

    It multiplies the mean of each group of g inputs, times the number of groups, so an input
    counts `(in / g) / g` times its group's column.

    Args:
        a: `[R, in / g]`.
    """
    num_groups = a.shape[1]
    group_size = in_features // num_groups
    return a.repeat_interleave(group_size, dim=1) * (num_groups / group_size)


def dora_gain(
    weight: torch.Tensor, update: Factors, scale: float, magnitude: torch.Tensor
) -> torch.Tensor:
    """Return DoRA's factor of every output: `m / ||W + s B A||`, norms of rows.

    Args:
        weight: `[out, in]` float32.
        magnitude: `[out]`.
    """
    a, b = update
    norms: torch.Tensor = torch.linalg.norm(weight + scale * (b @ a), dim=1)
    return magnitude / norms
