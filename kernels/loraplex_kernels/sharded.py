"""A step's operations on one of several ranks: LoRA by S-LoRA's partition (arXiv 2311.03285, 6).

    column-parallel (qkv, gate and up)     row-parallel (o, down)
    A cut over its rank rows               A cut over its inputs
    shrink, all-gather                     shrink, all-reduce
    B cut over its outputs                 B cut over its outputs
    expand into the rank's outputs         expand into the rank's columns of the partial outputs

Only tensors as wide as a LoRA rank travel. The gather of row-parallel outputs is the base's own
all-reduce: each column's update is in one summand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from loraplex_kernels.batch import AttentionBatch, LoRABatch
from loraplex_kernels.collectives import Collectives
from loraplex_kernels.model_tables import HeadNorms, LoRASite, RopeTable
from loraplex_kernels.ops import DeviceBackend, KernelBackend, LoRAHalves, StepOps


@dataclass(frozen=True)
class ShardedBackend:
    """Implements `ops.KernelBackend` over a backend that computes one rank's part."""

    inner: KernelBackend
    group: Collectives

    def prepare(
        self,
        attention: AttentionBatch,
        lora: LoRABatch | None,
        more_lora: Sequence[LoRABatch] = (),
    ) -> ShardedOps:
        return ShardedOps(self.inner.prepare(attention, lora, more_lora), self.group)


@dataclass(frozen=True)
class ShardedDeviceBackend(ShardedBackend):
    """Implements `ops.DeviceBackend` over one. All ranks record, and replay, the same steps: what
    `fill` refuses depends on what a step exchanges, and that is alike on all of them.
    """

    inner: DeviceBackend

    def fill(self, attention: AttentionBatch, lora: LoRABatch | None, num_rows: int) -> bool:
        return self.inner.fill(attention, lora, num_rows)

    def static_ops(self, num_rows: int, *, has_lora: bool) -> ShardedOps:
        return ShardedOps(self.inner.static_ops(num_rows, has_lora=has_lora), self.group)


@dataclass(frozen=True)
class ShardedOps:
    """Implements `ops.StepOps`: all but LoRA concerns one rank alone."""

    inner: StepOps
    group: Collectives

    @property
    def lora_halves(self) -> Sequence[LoRAHalves]:
        return self.inner.lora_halves

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self.inner.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner.add_rms_norm(x, residual, weight, eps)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self.inner.silu_mul(gate_up)

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        kv: torch.Tensor,
        rope: RopeTable,
        norms: HeadNorms | None,
        eps: float,
    ) -> torch.Tensor:
        return self.inner.rotate_and_store(qkv, kv, rope, norms, eps)

    def attend(
        self, query: torch.Tensor, kv: torch.Tensor, *, scale: float, window: int | None
    ) -> torch.Tensor:
        return self.inner.attend(query, kv, scale=scale, window=window)

    def add_lora(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        pool_layer: torch.Tensor,
        *,
        layer: int,
        site: LoRASite,
    ) -> None:
        """Add LoRA to the rank's part of a site: of row-parallel ones before it is summed."""
        for halves in self.inner.lora_halves:
            planes = halves.shrink(x, pool_layer, layer=layer, site=site)
            if site.is_row_parallel:
                self.group.all_reduce(planes, "lora")
                columns = _own_columns(y, site, self.group.rank)
                padded = _padded(columns, site)
                halves.expand(padded, planes, pool_layer, layer=layer, site=site)
                if padded is not columns:
                    columns.copy_(padded[:, : columns.shape[1]])
            else:
                gathered = self.group.all_gather(planes, "lora")
                order = halves.gather_order(layer=layer, site=site, num_ranks=self.group.num_ranks)
                whole = gathered.view(-1).index_select(0, order)
                halves.expand(y, whole, pool_layer, layer=layer, site=site)


def _own_columns(y: torch.Tensor, site: LoRASite, rank: int) -> torch.Tensor:
    """Return the columns of `y` `[T, H]` that a rank's B has outputs for; a view."""
    (width,) = site.out_features
    return y[:, rank * width : (rank + 1) * width]


def _padded(columns: torch.Tensor, site: LoRASite) -> torch.Tensor:
    """Return columns as wide as B; where H does not divide, the last rank has fewer."""
    missing = site.out_features[0] - columns.shape[1]
    return F.pad(columns, (0, missing)) if missing else columns
