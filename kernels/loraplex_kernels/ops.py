"""The operations the model calls; this file alone chooses who computes them.

A `KernelBackend` lives as long as the engine. Before each forward pass it turns the step's batches
into `StepOps`, which is all that the model sees of them. `cpu.py` computes on the host, `gpu.py`
through Triton; `reference.py` defines what both compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from loraplex_kernels.batch import AttentionBatch, LoRABatch
from loraplex_kernels.collectives import Collectives
from loraplex_kernels.model_tables import (
    HeadNorms,
    KernelModel,
    LoRASite,
    RopeTable,
    StepCapacity,
)


class LoRAHalves(Protocol):
    """LoRA of one batch in two halves, for what travels between: see `lora_planes`."""

    def shrink(
        self, x: torch.Tensor, pool_layer: torch.Tensor, *, layer: int, site: LoRASite
    ) -> torch.Tensor:
        """See `reference.shrink`."""
        ...

    def expand(
        self,
        y: torch.Tensor,
        planes: torch.Tensor,
        pool_layer: torch.Tensor,
        *,
        layer: int,
        site: LoRASite,
    ) -> None:
        """See `reference.expand`."""
        ...

    def gather_order(self, *, layer: int, site: LoRASite, num_ranks: int) -> torch.Tensor:
        """See `lora_planes.gather_order`; on the device."""
        ...


class StepOps(Protocol):
    """The operations of one forward pass over `T` tokens, bound to its batches.

    All tensors are on the backend's device and of the model's dtype.
    """

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `reference.rms_norm`."""
        ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `reference.add_rms_norm`."""
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `reference.silu_mul`."""
        ...

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        kv: torch.Tensor,
        rope: RopeTable,
        norms: HeadNorms | None,
        eps: float,
    ) -> torch.Tensor:
        """Norm and rotate the heads of each token, and write its K and V into their page.

        Args:
            qkv: `[T, (heads + 2 kv_heads) head_dim]`.
            kv: `[P, 2, page_tokens, kv_heads, head_dim]`, one layer of the pool; written.
            rope: the model's one table, indexed by each token's position.
            norms: for models with q/k norm, applied before the rotation.
            eps: of the norms.

        Returns:
            The rotated queries `[T, heads, head_dim]`.
        """
        ...

    def attend(
        self, query: torch.Tensor, kv: torch.Tensor, *, scale: float, window: int | None
    ) -> torch.Tensor:
        """See `reference.paged_attention`."""
        ...

    @property
    def lora_halves(self) -> Sequence[LoRAHalves]:
        """What `add_lora` does one after the other, for those who have to come between."""
        ...

    def add_lora(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        pool_layer: torch.Tensor,
        *,
        layer: int,
        site: LoRASite,
    ) -> None:
        """See `reference.add_lora`; does nothing when no token of the step has an adapter."""
        ...


class KernelBackend(Protocol):
    """Owned by the runner; one per engine."""

    def prepare(
        self,
        attention: AttentionBatch,
        lora: LoRABatch | None,
        more_lora: Sequence[LoRABatch] = (),
    ) -> StepOps:
        """Bring a step's batches to where its operations read them; good for this step alone.

        Args:
            more_lora: batches added one after the other behind `lora`, for rows that have several
                adapters: a row is in each batch once at most.
        """
        ...


class DeviceBackend(KernelBackend, Protocol):
    """A backend whose operations on decode steps can be recorded once and replayed."""

    def fill(self, attention: AttentionBatch, lora: LoRABatch | None, num_rows: int) -> bool:
        """Fill the static tables with a decode step; False when they are too small for it."""
        ...

    def static_ops(self, num_rows: int, *, has_lora: bool) -> StepOps:
        """Return the operations of all decode steps of so many rows, whatever `fill` brings."""
        ...


def host_backend() -> KernelBackend:
    """Return the backend of a CPU."""
    from loraplex_kernels.cpu import CpuBackend

    return CpuBackend()


def backend_of(group: Collectives | None, own: KernelBackend) -> KernelBackend:
    """Return the backend of one of several ranks; `own` computes its part. None: it is alone."""
    if group is None:
        return own
    from loraplex_kernels.sharded import ShardedBackend

    return ShardedBackend(own, group)


def device_backend(
    model: KernelModel,
    capacity: StepCapacity,
    device: torch.device,
    group: Collectives | None = None,
) -> DeviceBackend:
    """Return the backend of a GPU; of a CPU only under the Triton interpreter, for tests.

    Args:
        model: sizes of the part that is computed here.
        capacity: of the largest step.
        device: where to compute.
        group: the ranks that compute the model together; None where one does.
    """
    from loraplex_kernels.gpu import GpuBackend

    own = GpuBackend(model, capacity, device)
    if group is None:
        return own
    from loraplex_kernels.sharded import ShardedDeviceBackend

    return ShardedDeviceBackend(own, group)
