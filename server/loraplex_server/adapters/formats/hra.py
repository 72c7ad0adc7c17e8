"""`peft_type=HRA`: reflections of the base's own weights."""

from __future__ import annotations

from functools import partial
from typing import Final

import torch

from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.folds.factors import Factors
from loraplex_server.adapters.folds.householder import (
    fold_orthogonal_reflections,
    fold_reflections,
)
from loraplex_server.adapters.formats.field_table import linear_fields
from loraplex_server.adapters.formats.folded import FoldedReading, PlannedFold
from loraplex_server.adapters.formats.folder import PeftFolder

FIELDS: Final = linear_fields("r", "apply_GS", without=("fan_in_fan_out",))


def read_hra(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read an HRA; a `FormatReader`."""
    reading = FoldedReading(folder, base, FIELDS, own_bias="hra_only")
    rank = folder.config.positive_int("r", 8)
    is_orthogonal = folder.config.flag("apply_GS")
    folds = []
    for group in folder.linears(("hra_u",), rule=reading.rule):
        num_in, _ = reading.shape(group.linear)
        name = group.names["hra_u"]
        if not folder.check_rank(rank, group.linear.module):
            folder.ignore(name, "not read, because of r")
            continue
        u = folder.take(name, (num_in, rank), fold="reflections of the base, in compact WY form")
        if not folder.ledger and bool((u.double().norm(dim=0) == 0).any()):
            folder.refuse(name, "holds a reflection of length 0, which PEFT divides by")
        compute = partial(_fold, base, group.linear.module, u, is_orthogonal)
        folds.append(PlannedFold(group.linear, rank, compute))
    return reading.finish(folds)


def _fold(base: BaseModel, module: str, u: torch.Tensor, is_orthogonal: bool) -> Factors:
    fold = fold_orthogonal_reflections if is_orthogonal else fold_reflections
    return fold(base.tensor(f"{module}.weight"), u)
