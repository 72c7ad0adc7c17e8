"""The halves of LoRA through Triton, for what several GPUs exchange between them.

The shrink adds its K parts itself, so that one plane travels; both launches are the kernels of
large steps on one GPU, over items that place their planes as `lora_planes` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraplex_kernels import lora_launch
from loraplex_kernels.lora_exchange import ExchangeTables
from loraplex_kernels.lora_shape import LoRAShape
from loraplex_kernels.lora_work import LoRATables
from loraplex_kernels.model_tables import LoRASite


@dataclass(frozen=True)
class GpuLoRAHalves:
    """Implements `ops.LoRAHalves`.

    In a recorded step `shrink` returns more than the adapters have: what is behind it is arbitrary,
    and no order names it.
    """

    tables: LoRATables
    exchange: ExchangeTables
    shapes: Sequence[LoRAShape]
    num_programs: int

    def shrink(
        self, x: torch.Tensor, pool_layer: torch.Tensor, *, layer: int, site: LoRASite
    ) -> torch.Tensor:
        num_elems = self.exchange.num_sent[self.exchange.classes[layer]][site.index]
        planes = torch.empty(num_elems, dtype=torch.float32, device=x.device)
        lora_launch.shrink(
            x,
            pool_layer,
            self.tables,
            planes,
            layer=layer,
            shape=self.shapes[site.index],
            num_programs=self.num_programs,
        )
        return planes

    def expand(
        self,
        y: torch.Tensor,
        planes: torch.Tensor,
        pool_layer: torch.Tensor,
        *,
        layer: int,
        site: LoRASite,
    ) -> None:
        lora_launch.expand(
            y,
            pool_layer,
            self.tables,
            planes,
            layer=layer,
            shape=self.shapes[site.index],
            num_programs=self.num_programs,
        )

    def gather_order(self, *, layer: int, site: LoRASite, num_ranks: int) -> torch.Tensor:
        return self.exchange.orders[self.exchange.classes[layer]][site.index]
