"""Vectors on outputs: `peft_type=BEFT`, and `SSF`, which has no class in PEFT.

SSF (arXiv 2210.08823) is `scale * (W x + b) + shift`; its files name the vectors `ssf_scale` and
`ssf_shift` behind the name of the linear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from loraplex_memory.adapter_spec import bias, out_scale
from loraplex_memory.adapter_weights import AdapterWeights, PartKey
from loraplex_memory.layout import Projection
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.formats.field_table import FieldTable
from loraplex_server.adapters.formats.folder import PeftFolder
from loraplex_server.adapters.formats.linears import Linear
from loraplex_server.adapters.formats.whole_modules import read_whole_modules

BEFT_FIELDS: Final = FieldTable(
    frozenset({"target_modules", "modules_to_save"}), {"init_weights": "initialisation only"}
)
SSF_FIELDS: Final = BEFT_FIELDS


def read_beft(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read biases that are added to outputs, where the base has none too; a `FormatReader`."""
    BEFT_FIELDS.account(folder.config)
    rule = folder.config.target_rule()
    parts = read_whole_modules(folder, base)
    for group in folder.linears(("beft_bias",), rule=rule):
        shape = 1, group.linear.out_features(base.geometry)
        vector = folder.take(group.names["beft_bias"], shape)
        parts |= _rows(base, group.linear, vector.flatten(), bias)
    return AdapterWeights(parts=parts)


def read_ssf(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read scales and shifts of outputs; a `FormatReader`."""
    SSF_FIELDS.account(folder.config)
    rule = folder.config.target_rule()
    parts = read_whole_modules(folder, base)
    for group in folder.linears(("ssf_scale", "ssf_shift"), rule=rule):
        shape = (group.linear.out_features(base.geometry),)
        for suffix, part in (("ssf_scale", out_scale), ("ssf_shift", bias)):
            parts |= _rows(base, group.linear, folder.take(group.names[suffix], shape), part)
    return AdapterWeights(parts=parts)


def _rows(
    base: BaseModel, linear: Linear, vector: torch.Tensor, part: Callable[[Projection], str]
) -> dict[PartKey, torch.Tensor]:
    """Return the rows `[1, out]` of each projection of a linear."""
    return {
        (part(projection), linear.layer): rows[None]
        for projection, rows in linear.split_rows(vector, base.geometry)
    }
