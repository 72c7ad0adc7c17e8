"""The operations of one step on a GPU: Triton kernels, bound to the step's tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraplex_kernels import attention_launch, elementwise_triton, lora_launch
from loraplex_kernels.attention_launch import DecodeScratch
from loraplex_kernels.attention_work import AttentionTables, AttentionTiling
from loraplex_kernels.gpu_halves import GpuLoRAHalves
from loraplex_kernels.lora_shape import LoRAShape
from loraplex_kernels.lora_work import LoRATables
from loraplex_kernels.model_tables import HeadNorms, LoRASite, RopeTable


@dataclass(frozen=True)
class GpuOps:
    """Implements `ops.StepOps` through Triton; waits for nothing and reads no device memory.

    LoRA is bound either to be added in one go, `lora` and then `more_lora`, or on one of several
    devices in `lora_halves`: their planes lie otherwise.
    """

    attention: AttentionTables
    scratch: DecodeScratch
    tiling: AttentionTiling
    lora: LoRATables | None
    lora_shapes: list[LoRAShape]
    lora_programs: int
    attention_programs: int
    more_lora: tuple[LoRATables, ...] = ()
    lora_halves: tuple[GpuLoRAHalves, ...] = ()

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return elementwise_triton.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return elementwise_triton.add_rms_norm(x, residual, weight, eps, out=x)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return elementwise_triton.silu_mul(gate_up)

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        kv: torch.Tensor,
        rope: RopeTable,
        norms: HeadNorms | None,
        eps: float,
    ) -> torch.Tensor:
        return elementwise_triton.rotate_and_store(
            qkv,
            kv,
            rope.cos,
            rope.sin,
            self.attention.positions,
            self.attention.slots,
            q_norm=norms.q if norms else None,
            k_norm=norms.k if norms else None,
            eps=eps,
        )

    def attend(
        self, query: torch.Tensor, kv: torch.Tensor, *, scale: float, window: int | None
    ) -> torch.Tensor:
        out = torch.empty_like(query)
        attention_launch.decode_attention(
            query,
            kv,
            self.attention,
            self.scratch,
            scale=scale,
            tiling=self.tiling,
            num_programs=self.attention_programs,
            out=out,
            window=window,
        )
        return attention_launch.prefill_attention(
            query, kv, self.attention, scale=scale, tiling=self.tiling, out=out, window=window
        )

    def add_lora(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        pool_layer: torch.Tensor,
        *,
        layer: int,
        site: LoRASite,
    ) -> None:
        assert not self.lora_halves, "somebody comes between the halves"
        for tables in (self.lora, *self.more_lora):
            if tables is None:
                continue
            lora_launch.add_lora(
                y,
                x,
                pool_layer,
                tables,
                layer=layer,
                shape=self.lora_shapes[site.index],
                num_programs=self.lora_programs,
            )
