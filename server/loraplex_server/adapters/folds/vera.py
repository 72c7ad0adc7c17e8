"""VeRA (arXiv 2310.11454) and PVeRA: `diag(b) B diag(d) A`, with A and B shared by all linears.

The shared matrices are as large as the largest linear needs; the others use their first rows and
columns. Files may leave them out: then they are drawn again from the key, as PEFT draws them.
"""

from __future__ import annotations

import math

import torch

from loraplex_server.adapters.folds.factors import Factors


def fold_vera(
    shared_a: torch.Tensor, shared_b: torch.Tensor, d: torch.Tensor, b: torch.Tensor, num_in: int
) -> Factors:
    """Args:
    shared_a: `[R, >= in]`.
    shared_b: `[>= out, R]`.
    d: `[R]`.
    b: `[out]`.
    num_in: input features of the linear.
    """
    a = d.double()[:, None] * shared_a.double()[:, :num_in]
    return a, b.double()[:, None] * shared_b.double()[: len(b)]


def fold_pvera(
    shared_a: torch.Tensor, shared_b: torch.Tensor, d: torch.Tensor, b: torch.Tensor, num_in: int
) -> Factors:
    """Return the mean of PVeRA's distribution, which is what PEFT computes unless it samples.

    The second half of the rows of `shared_a` `[2 R, >= in]` and of `d` `[2 R]` give a variance.
    """
    rank = len(d) // 2
    return fold_vera(shared_a[:rank], shared_b, d[:rank], b, num_in)


def draw_projections(
    key: int, rank: int, num_in: int, num_out: int, *, rows_per_rank: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the shared A `[R, in]`, then B `[out, R]`, float32, as PEFT does from `key`.

    Kaiming-uniform by fan-in with gain sqrt(2), from one generator on the CPU.

    Args:
        num_in, num_out: the largest of any linear that has the adapter.
        rows_per_rank: 2 for PVeRA, whose A has R more rows for the variance.
    """
    generator = torch.Generator().manual_seed(key)
    shapes = (rank * rows_per_rank, num_in), (num_out, rank)
    a, b = (_kaiming_uniform(shape, generator) for shape in shapes)
    return a, b


def _kaiming_uniform(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    # In this order of operations, so that the bound is PEFT's to the last bit.
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
