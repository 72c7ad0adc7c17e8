"""`peft_type=DEFT`, PaRa included: a subspace of the base's weights is replaced or removed."""

from __future__ import annotations

from functools import partial
from typing import Final

import torch

from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.folds.deft import Decomposition, fold_deft
from loraplex_server.adapters.folds.factors import Factors
from loraplex_server.adapters.formats.field_table import dropout, linear_fields
from loraplex_server.adapters.formats.folded import FoldedReading, PlannedFold
from loraplex_server.adapters.formats.folder import PeftFolder

FIELDS: Final = linear_fields(
    "r",
    "alpha",
    "para",
    "decomposition_method",
    no_effect={"init_scale": "initialisation only", **dropout("deft_dropout")},
)
_METHODS: Final[tuple[Decomposition, ...]] = ("relu", "qr")
_HOW: Final = "less what the base does in its subspace"


def read_deft(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read a DEFT; a `FormatReader`."""
    reading = FoldedReading(folder, base, FIELDS, own_bias="deft_only")
    fields = folder.config
    rank = fields.positive_int("r", 8)
    # Without an alpha, or with 0, the injection is not scaled.
    alpha = 0.0 if fields.raw("alpha") is None else fields.number("alpha", 0.0)
    method = fields.choice("decomposition_method", _METHODS, "relu")
    only_removes = fields.flag("para")
    suffixes = ("deft_P",) if only_removes else ("deft_P", "deft_R")
    folds = []
    for group in folder.linears(suffixes, rule=reading.rule):
        num_in, num_out = reading.shape(group.linear)
        # As PEFT caps it: there is no larger subspace of the outputs.
        own_rank = min(rank, num_out)
        p = folder.take(group.names["deft_P"], (num_out, own_rank), fold=_HOW)
        injection = None
        if not only_removes:
            injection = folder.take(group.names["deft_R"], (own_rank, num_in), fold=_HOW)
        scale = alpha / own_rank if alpha else 1.0
        compute = partial(_fold, base, group.linear.module, p, injection, method, scale)
        folds.append(PlannedFold(group.linear, own_rank, compute))
    return reading.finish(folds)


def _fold(
    base: BaseModel,
    module: str,
    p: torch.Tensor,
    injection: torch.Tensor | None,
    method: Decomposition,
    scale: float,
) -> Factors:
    weight = base.tensor(f"{module}.weight")
    return fold_deft(weight, p, injection, decomposition=method, scale=scale)
