"""AdaLoRA (arXiv 2303.10512): `scale / (init_r + 1e-5) * B diag(E) A`, at whatever rank is left."""

from __future__ import annotations

import torch

from loraplex_server.adapters.folds.factors import Factors

#: PEFT divides by the rank it began with, plus this.
_EPSILON = 1e-5


def fold_adalora(
    a: torch.Tensor, b: torch.Tensor, e: torch.Tensor, *, scale: float, initial_rank: int
) -> Factors:
    """Args:
    a: `[R, in]`.
    b: `[out, R]`.
    e: singular values `[R, 1]`.
    scale: `lora_alpha`, not divided by a rank.
    initial_rank: `init_r`; the pruned rank has no say.
    """
    return e.double() * a.double(), b.double() * (scale / (initial_rank + _EPSILON))
