"""The tensors of a LoRA's linears, each taken at the shape that the configuration says."""

from __future__ import annotations

from typing import Final

import torch

from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.formats.folder import LinearTensors, PeftFolder
from loraplex_server.adapters.formats.linears import PREFIX, Linear
from loraplex_server.adapters.formats.lora_fields import LoraFields
from loraplex_server.adapters.formats.lora_linear import LoraLinear

_A: Final = "lora_A.weight"
_B: Final = "lora_B.weight"
_B_BIAS: Final = "lora_B.bias"
_DIAGONAL: Final = "lora_diag"
#: As files have it, and as PEFT's classes name it.
#: What a file may call DoRA's magnitudes, of a linear and of the embedding.
MAGNITUDES: Final = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
_LATENTS: Final = ("lora_latent_mapping.weight", "default_lora_latent_mapping.weight")
#: What VeLoRA compresses gradients with.
_VELORA: Final = "lora_velora_embed"


class LoraTensors:
    """Takes everything there is to one linear; every fault goes to the folder's ledger."""

    def __init__(self, folder: PeftFolder, base: BaseModel, fields: LoraFields) -> None:
        self._folder = folder
        self._geometry = base.geometry
        self._fields = fields

    def take(self) -> list[LoraLinear]:
        """Return the linears without a fault; raises PatternError."""
        groups = self._folder.linears(
            (_A, _B, _B_BIAS, _DIAGONAL, *MAGNITUDES, *_LATENTS, _VELORA),
            required=(_A, _B),
            rule=self._fields.targets,
        )
        return [linear for group in groups if (linear := self._take_one(group)) is not None]

    def _take_one(self, group: LinearTensors) -> LoraLinear | None:
        fields, linear = self._fields, group.linear
        rank = fields.ranks.rank_of(linear.module)
        if not (self._is_small(linear, rank) and self._can_cut(linear, rank)):
            return None
        rows, columns = linear.out_features(self._geometry), linear.in_features(self._geometry)
        in_blocks, out_blocks = fields.blocks.blocks_of(linear.module)
        how = self._how()
        a_shape = (rank, columns // in_blocks // fields.group_size)
        if _VELORA in group.names:
            self._folder.ignore(group.names[_VELORA], "compresses gradients while training")
        return LoraLinear(
            linear=linear,
            fields=fields,
            rank=rank,
            scale=fields.ranks.scale_of(linear.module),
            a=self._folder.take(group.names[_A], a_shape, fold=how),
            b=self._folder.take(group.names[_B], (rows, rank // out_blocks), fold=how),
            latent=self._take_latent(group, rank),
            diagonal=self._take_vector(
                group, (_DIAGONAL,), rank, fields.is_kasa, "multiplied into lora_B"
            ),
            magnitude=self._take_vector(
                group, MAGNITUDES, rows, fields.use_dora, "over the norms of W + s B A"
            ),
            output_bias=self._take_vector(
                group, (_B_BIAS,), rows, fields.has_lora_bias, "times the scale"
            ),
        )

    def _how(self) -> str | None:
        """Return how pairs are folded; None where they are served as stored."""
        fields = self._fields
        if fields.init != "plain":
            return f"less what {fields.init} takes out of the base, recompressed"
        if fields.is_kasa:
            return "with the singular values that KaSA drops from the base, recompressed"
        if fields.blocks.num_blocks > 1:
            return "blocks on the diagonal of a whole matrix"
        return "a column for each of the pooled inputs" if fields.group_size > 1 else None

    def _is_small(self, linear: Linear, rank: int) -> bool:
        """Check the rank, and what folding makes of it before it takes its time."""
        if not self._folder.check_rank(rank, linear.module):
            return False
        if self._fields.init == "plain" and not self._fields.is_kasa:
            return True
        sides = linear.out_features(self._geometry), linear.in_features(self._geometry)
        return self._folder.check_rank(min(2 * rank, *sides), linear.module, what="folded rank")

    def _can_cut(self, linear: Linear, rank: int) -> bool:
        """Check what PEFT checks before it makes a variant's layer."""
        rows, columns = linear.out_features(self._geometry), linear.in_features(self._geometry)
        in_blocks, out_blocks = self._fields.blocks.blocks_of(linear.module)
        group = self._fields.group_size
        faults = []
        if columns % (in_blocks * group) or rank % in_blocks:
            faults.append(f"{columns} inputs of rank {rank} cannot be cut into {in_blocks * group}")
        if rows % out_blocks or rank % out_blocks:
            faults.append(f"{rows} outputs of rank {rank} cannot be cut into {out_blocks}")
        if self._fields.is_kasa and rank >= min(rows, columns):
            faults.append(f"KaSA of rank {rank} would drop all of the base's weight")
        for fault in faults:
            self._folder.ledger.refuse(fault, linear.module)
        return not faults

    def _take_latent(self, group: LinearTensors, rank: int) -> torch.Tensor | None:
        # LoRA-XS strips ".default" from the names of its files, its dot included.
        joined = f"{PREFIX}{group.linear.module}_{_LATENTS[0]}"
        names = [group.names[suffix] for suffix in _LATENTS if suffix in group.names]
        names += [joined] if self._folder.has(joined) else []
        if not names:
            return None
        return self._folder.take(names[0], (rank, rank), fold="multiplied into lora_B")

    def _take_vector(
        self, group: LinearTensors, suffixes: tuple[str, ...], size: int, is_on: bool, fold: str
    ) -> torch.Tensor | None:
        """Take the vector of a variant, which must be there if the variant is on."""
        names = [group.names[suffix] for suffix in suffixes if suffix in group.names]
        if not is_on:
            return None
        if not names:
            self._folder.ledger.refuse(f"has no {suffixes[0]}", group.linear.module)
            return None
        return self._folder.take(names[0], (size,), fold=fold)
