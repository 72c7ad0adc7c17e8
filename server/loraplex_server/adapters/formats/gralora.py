"""`peft_type=GRALORA`, with or without a plain LoRA beside its blocks."""

from __future__ import annotations

from functools import partial
from typing import Final

import torch

from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.folds.factors import Factors, stack
from loraplex_server.adapters.folds.gralora import fold_gralora
from loraplex_server.adapters.formats.field_table import dropout, linear_fields
from loraplex_server.adapters.formats.folded import FoldedReading, PlannedFold
from loraplex_server.adapters.formats.folder import LinearTensors, PeftFolder

FIELDS: Final = linear_fields(
    "r",
    "hybrid_r",
    "alpha",
    "gralora_k",
    without=("exclude_modules",),
    no_effect=dropout("gralora_dropout"),
)
_BLOCKS: Final = ("gralora_A", "gralora_B")
_GENERAL: Final = ("gralora_A_general.weight", "gralora_B_general.weight")
_HOW: Final = "blocks side by side at rank k * r"


def read_gralora(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read a GraLoRA; a `FormatReader`."""
    reading = FoldedReading(folder, base, FIELDS, own_bias="gralora_only")
    fields = folder.config
    rank, k = fields.positive_int("r", 32), fields.positive_int("gralora_k", 2)
    hybrid = fields.positive_int("hybrid_r", 0) if fields.raw("hybrid_r", 0) != 0 else 0
    scale = fields.number("alpha", 64) / (rank + hybrid)
    if rank % k:
        fields.refuse("gralora_k", f"does not divide r={rank}, so PEFT cannot run it")
    suffixes = (*_BLOCKS, *_GENERAL) if hybrid else _BLOCKS
    folds = []
    for group in folder.linears(suffixes, rule=reading.rule):
        num_in, num_out = reading.shape(group.linear)
        if num_in % k or num_out % k:
            folder.ledger.refuse(f"gralora_k={k} does not divide it", group.linear.module)
            continue
        a = folder.take(group.names[_BLOCKS[0]], (k, num_in // k, rank), fold=_HOW)
        b = folder.take(group.names[_BLOCKS[1]], (k, rank, num_out // k), fold=_HOW)
        general = _take_general(folder, group, (hybrid, num_in), (num_out, hybrid))
        compute = partial(_fold, a, b, general, scale)
        folds.append(PlannedFold(group.linear, k * rank + hybrid, compute))
    return reading.finish(folds)


def _take_general(
    folder: PeftFolder, group: LinearTensors, a_shape: tuple[int, int], b_shape: tuple[int, int]
) -> Factors | None:
    if a_shape[0] == 0:
        return None
    a, b = (
        folder.take(group.names[name], shape, fold="beside the blocks")
        for name, shape in zip(_GENERAL, (a_shape, b_shape), strict=True)
    )
    return a, b


def _fold(a: torch.Tensor, b: torch.Tensor, general: Factors | None, scale: float) -> Factors:
    blocks = fold_gralora(a, b, scale=scale)
    return blocks if general is None else stack([blocks, general], [1.0, scale])
