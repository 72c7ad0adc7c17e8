"""One linear with a PEFT adapter on it, everything random and in float64: a judge of folds."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from loraplex_server.adapters.folds.factors import Factors

NUM_IN, NUM_OUT = 24, 36


class Linears(nn.Module):
    """`wide` and `deep` have different shapes, for what adapters share between linears."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(NUM_IN, NUM_OUT, bias=False)
        self.deep = nn.Linear(NUM_OUT, NUM_IN, bias=False)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        hidden: torch.Tensor = self.wide(x, **kwargs)
        return hidden


class TunedLinear:
    """`Linears` with an adapter.

    Attributes:
        model: PEFT's model.
        weight: of `wide` without the adapter, `[NUM_OUT, NUM_IN]`.
        layer: PEFT's layer on `wide`.
    """

    def __init__(self, config: PeftConfig, *, seed: int = 0) -> None:
        torch.manual_seed(seed)
        base = Linears()
        self.weight = base.wide.weight.detach().double().clone()
        self.model: Any = get_peft_model(base, config).double().eval()
        self.layer: Any = self.model.base_model.model.wide
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "base_layer" not in name and parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))

    def of(self, name: str) -> torch.Tensor:
        """Return the adapter's tensor of this name on `wide`."""
        found = getattr(self.layer, name)["default"]
        tensor: torch.Tensor = getattr(found, "weight", found)
        return tensor.detach()

    @torch.no_grad()
    def update(self, **kwargs: Any) -> torch.Tensor:
        """Return what PEFT's forward adds to the weight of `wide`."""
        whole = self.model(torch.eye(NUM_IN, dtype=torch.float64)[None], **kwargs)[0].T
        return whole.double() - self.weight


def assert_same_update(update: torch.Tensor, factors: Factors, *, tolerance: float = 1e-9) -> None:
    """Check that the product of the factors is the update, and that there is one at all."""
    a, b = factors
    assert a.dtype == b.dtype == torch.float64
    assert a.shape[0] == b.shape[1]
    assert update.abs().max() > 0.05
    torch.testing.assert_close(b @ a, update, rtol=tolerance, atol=tolerance)
