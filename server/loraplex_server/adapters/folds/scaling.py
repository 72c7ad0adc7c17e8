"""Vectors that scale: moving a scale of inputs to where it costs nothing."""

from __future__ import annotations

from collections.abc import Collection

import torch


def join_scales(scales: Collection[torch.Tensor]) -> torch.Tensor | None:
    """Return the one vector that linears with one input share, None if they differ.

    Args:
        scales: of the input of each linear, `[in]`.
    """
    first, *others = scales
    return first if all(torch.equal(first, other) for other in others) else None


def scale_gated_output(up: torch.Tensor | None, down_input: torch.Tensor) -> torch.Tensor:
    """Return up's output scale that also scales down's input.

    `down(l * (silu(gate) * up)) = down(silu(gate) * (l * up))`: exact, as the product is
    elementwise.

    Args:
        up: scale of up's output `[intermediate]`, if there is one already.
        down_input: `[intermediate]`.
    """
    return down_input if up is None else up * down_input
