"""`peft_type=PACA`, of the authors' fork of PEFT: some columns of the weights are replaced."""

from __future__ import annotations

from functools import partial
from typing import Final

import torch

from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.folds.factors import Factors
from loraplex_server.adapters.folds.paca import fold_paca
from loraplex_server.adapters.formats.field_table import linear_fields
from loraplex_server.adapters.formats.folded import FoldedReading, PlannedFold
from loraplex_server.adapters.formats.folder import PeftFolder

FIELDS: Final = linear_fields("r", "paca_alpha")
_HOW: Final = "less the base's columns"


def read_paca(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read a PaCA; a `FormatReader`."""
    reading = FoldedReading(folder, base, FIELDS, own_bias="paca_only")
    rank = folder.config.positive_int("r", 8)
    scale = folder.config.number("paca_alpha", 8) / rank
    folds = []
    for group in folder.linears(("paca_w", "paca_indices"), rule=reading.rule):
        num_in, num_out = reading.shape(group.linear)
        columns = folder.take(group.names["paca_w"], (num_out, rank), fold=_HOW)
        name = group.names["paca_indices"]
        indices = folder.take_ints(name, (rank,), fold=_HOW)
        if not folder.ledger and not _are_inputs(indices.tolist(), num_in):
            folder.refuse(name, f"must be different inputs below {num_in}")
        compute = partial(_fold, base, group.linear.module, columns, indices, scale)
        folds.append(PlannedFold(group.linear, rank, compute))
    return reading.finish(folds)


def _are_inputs(indices: list[int], num_in: int) -> bool:
    return len(set(indices)) == len(indices) and 0 <= min(indices) <= max(indices) < num_in


def _fold(
    base: BaseModel, module: str, columns: torch.Tensor, indices: torch.Tensor, scale: float
) -> Factors:
    return fold_paca(base.tensor(f"{module}.weight"), columns, indices, scale=scale)
