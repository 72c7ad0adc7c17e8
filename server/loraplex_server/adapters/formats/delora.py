"""`peft_type=DELORA`."""

from __future__ import annotations

from functools import partial
from typing import Final

from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.folds.delora import fold_delora
from loraplex_server.adapters.formats.field_table import dropout, linear_fields
from loraplex_server.adapters.formats.folded import FoldedReading, PlannedFold
from loraplex_server.adapters.formats.folder import PeftFolder

_TRAINED: Final = "the file holds the trained value"
FIELDS: Final = linear_fields(
    "r",
    "rank_pattern",
    without=("fan_in_fan_out",),
    no_effect={
        "delora_lambda": _TRAINED,
        "lambda_pattern": _TRAINED,
        **dropout("module_dropout"),
    },
)
_NOT_OURS: Final = "is an option of LoRA, not of DeLoRA"
_SUFFIXES: Final = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")


def read_delora(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read a DeLoRA; a `FormatReader`."""
    reading = FoldedReading(folder, base, FIELDS, own_bias="delora_only")
    folder.config.must_be_off(dict.fromkeys(("use_rslora", "lora_alpha"), _NOT_OURS))
    rule = folder.config.rank_rule()
    folds = []
    for group in folder.linears(_SUFFIXES, rule=reading.rule):
        num_in, num_out = reading.shape(group.linear)
        rank = rule.rank_of(group.linear.module)
        shapes = (rank, num_in), (num_out, rank), (1,), (num_in,)
        tensors = [
            folder.take(
                group.names[suffix], shape, fold="norms, strength and directions in A and B"
            )
            for suffix, shape in zip(_SUFFIXES, shapes, strict=True)
        ]
        folds.append(PlannedFold(group.linear, rank, partial(fold_delora, *tensors)))
    return reading.finish(folds)
