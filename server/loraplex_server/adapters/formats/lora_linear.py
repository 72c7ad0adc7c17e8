"""One linear of a LoRA, with all that its variants store: from checked tensors to served ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loraplex_memory.adapter_spec import bias as bias_part
from loraplex_memory.adapter_spec import out_scale as out_scale_part
from loraplex_memory.adapter_weights import LoRAPair, ModuleKey, PartKey
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.folds.factors import Factors
from loraplex_server.adapters.folds.lora import (
    block_diagonal,
    dora_gain,
    kasa,
    olora_init,
    pissa_init,
    ungroup,
    without_init,
)
from loraplex_server.adapters.folds.recompress import recompress
from loraplex_server.adapters.formats.linears import Linear
from loraplex_server.adapters.formats.lora_fields import LoraFields


@dataclass(frozen=True)
class LoraLinear:
    """The checked tensors of one linear, as stored; nothing is computed yet.

    Attributes:
        a: `[R, in]`, or less where a variant stores blocks or pools inputs.
        b: `[out, R]`, likewise.
        latent: `[R, R]`, between B and A (LoRA-XS, LoRA-SB).
        diagonal: `[R]`, between B and A (KaSA).
        magnitude: `[out]` (DoRA).
        output_bias: `[out]`, of B (`lora_bias`).
    """

    linear: Linear
    fields: LoraFields
    rank: int
    scale: float
    a: torch.Tensor
    b: torch.Tensor
    latent: torch.Tensor | None = None
    diagonal: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    output_bias: torch.Tensor | None = None

    def pairs_and_parts(
        self, base: BaseModel, biases: Mapping[ModuleKey, torch.Tensor]
    ) -> tuple[dict[ModuleKey, LoRAPair], dict[PartKey, torch.Tensor]]:
        """Return what is served of it, per projection.

        Args:
            biases: trained ones, by projection, `[out]` float32.
        """
        a, b, scale = self._update(base)
        gain = None
        if self.magnitude is not None:
            weight = base.tensor(f"{self.linear.module}.weight")
            update = a.to(torch.float32), b.to(torch.float32)
            gain = dora_gain(weight, update, scale, self.magnitude.to(torch.float32))
        if self.fields.init != "plain" or self.diagonal is not None:
            a, b = recompress(a, b)
        pairs = self.linear.split_pair(a, b, scale, base.geometry)
        return pairs, self._parts(base, biases, gain)

    def _update(self, base: BaseModel) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return A `[K, in]`, B `[out, K]` and s of the update of the base's own weight.

        They are the stored tensors themselves unless something is to be folded.
        """
        a, b, scale = *self._whole(base), self.scale
        if self.latent is not None:
            b = b.to(torch.float32) @ self.latent.to(torch.float32)
        if self.diagonal is None and self.fields.init == "plain":
            return a, b, scale
        weight = base.tensor(f"{self.linear.module}.weight")
        factors = a.to(torch.float32), b.to(torch.float32)
        if self.diagonal is not None:
            return *kasa(factors, self.diagonal.to(torch.float32), weight, scale), 1.0
        return *without_init(factors, self._initial(weight), scale), 1.0

    def _whole(self, base: BaseModel) -> Factors:
        """Return A and B as whole matrices."""
        in_blocks, out_blocks = self.fields.blocks.blocks_of(self.linear.module)
        a = block_diagonal(self.a, in_blocks) if in_blocks > 1 else self.a
        b = block_diagonal(self.b, out_blocks) if out_blocks > 1 else self.b
        if self.fields.group_size > 1:
            a = ungroup(a.to(torch.float32), self.linear.in_features(base.geometry))
        return a, b

    def _initial(self, weight: torch.Tensor) -> Factors:
        if self.fields.init == "pissa":
            return pissa_init(weight, self.rank, self.scale)
        return olora_init(weight, self.rank)

    def _parts(
        self, base: BaseModel, biases: Mapping[ModuleKey, torch.Tensor], gain: torch.Tensor | None
    ) -> dict[PartKey, torch.Tensor]:
        """Return output scales and biases.

        PEFT computes `g (W x + s B A x) + b + s c`: DoRA's g does not scale the bias b, which may
        be trained; c is the bias of B. Ours is `g (W x + b0 + s B A x) + bias` with the base's own
        b0, so `bias = b - g b0 + s c`.
        """
        parts: dict[PartKey, torch.Tensor] = {}
        rows_of = self.linear.split_rows(
            torch.arange(self.linear.out_features(base.geometry)), base.geometry
        )
        for projection, rows in rows_of:
            key = self.linear.layer, projection
            own = base.bias(*key)
            shift = torch.zeros(len(rows))
            if own is not None:
                shift = biases.get(key, own) - (own if gain is None else gain[rows] * own)
            if self.output_bias is not None:
                shift = shift + self.scale * self.output_bias.to(torch.float32)[rows]
            if gain is not None:
                parts[out_scale_part(projection), self.linear.layer] = gain[rows][None]
            if shift.any() or key in biases:
                parts[bias_part(projection), self.linear.layer] = shift[None]
        return parts
