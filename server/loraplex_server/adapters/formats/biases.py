"""Trained biases of the base (`bias="all"` and the like): they replace the base's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import torch

from loraplex_memory.adapter_spec import bias as bias_part
from loraplex_memory.adapter_weights import ModuleKey, PartKey
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.formats.config_fields import ConfigFields
from loraplex_server.adapters.formats.folder import PeftFolder
from loraplex_server.adapters.formats.linears import PREFIX, parse_linear

BiasMode = Literal["none", "own", "all"]

_SUFFIXES: Final = (".base_layer.bias", ".bias")


def read_bias_mode(fields: ConfigFields, *, own: str) -> BiasMode:
    """Read the field `bias`.

    Args:
        own: what the format calls "those of the adapted linears" (`lora_only`).
    """
    mode = fields.choice("bias", ("none", "all", own), "none")
    return "own" if mode == own else "all" if mode == "all" else "none"


def read_biases(
    folder: PeftFolder, base: BaseModel, mode: BiasMode
) -> dict[ModuleKey, torch.Tensor]:
    """Return the new bias `[out]` of every projection that has one, float32.

    A tensor of a bias that the base does not have is refused: PEFT would not load it.
    """
    if mode == "none":
        return {}
    biases: dict[ModuleKey, torch.Tensor] = {}
    names = folder.keys()
    for name in names:
        suffix = next((s for s in _SUFFIXES if name.endswith(s)), None)
        linear = parse_linear(name[len(PREFIX) : -len(suffix)]) if suffix else None
        if linear is None or not name.startswith(PREFIX) or ".lora_" in name:
            continue
        if linear.layer >= base.geometry.num_layers:
            folder.refuse(name, f"the base has only {base.geometry.num_layers} layers")
        elif any((linear.layer, p) in biases for p in linear.projections):
            folder.refuse(name, "given both fused and split, or twice")
        elif not base.has_bias(linear.projections[0]):
            folder.refuse(name, "the base has no bias here, so PEFT would not load it")
        else:
            shape = (linear.out_features(base.geometry),)
            tensor = folder.take(name, shape, fold="the difference to the base's bias")
            for projection, rows in linear.split_rows(tensor, base.geometry):
                biases[linear.layer, projection] = rows.to(torch.float32)
    return biases


def shifts(
    base: BaseModel, biases: Mapping[ModuleKey, torch.Tensor]
) -> dict[PartKey, torch.Tensor]:
    """Return new biases as parts: what they add to those of the base."""
    return {
        (bias_part(projection), layer): (new - own)[None]
        for (layer, projection), new in biases.items()
        if (own := base.bias(layer, projection)) is not None
    }
