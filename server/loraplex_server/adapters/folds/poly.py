"""Poly and MHR (arXiv 2202.13914, 2211.03831): a task mixes LoRAs that all tasks share."""

from __future__ import annotations

import torch

from loraplex_server.adapters.folds.factors import Factors

_EPSILON = 1e-12


def fold_poly(a: torch.Tensor, b: torch.Tensor, logits: torch.Tensor) -> Factors:
    """Return one task's LoRA: factors are mixed, not products.

    Args:
        a: `[splits, skills, in / splits, R]`.
        b: `[splits, skills, R, out / splits]`.
        logits: the router's, of the task, `[splits * skills]`.
    """
    splits, skills, _, rank = a.shape
    shares = logits.double().view(splits, skills).sigmoid()
    shares = shares / (shares.sum(-1, keepdim=True) + _EPSILON)
    rows = torch.einsum("qs,qsdr->qdr", shares, a.double()).reshape(-1, rank)
    columns = torch.einsum("qs,qsrd->qdr", shares, b.double()).reshape(-1, rank)
    return rows.T.contiguous(), columns / rank
