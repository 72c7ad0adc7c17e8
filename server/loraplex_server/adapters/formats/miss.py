"""`peft_type=MISS`, and `BONE`, as PEFT called it before 0.18."""

from __future__ import annotations

from functools import partial
from typing import Final

from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.folds.miss import fold_miss
from loraplex_server.adapters.formats.field_table import dropout, linear_fields
from loraplex_server.adapters.formats.folded import FoldedReading, PlannedFold
from loraplex_server.adapters.formats.folder import PeftFolder

FIELDS: Final = linear_fields(
    "r",
    "mini_r",
    "init_weights",
    without=("fan_in_fan_out",),
    no_effect=dropout("miss_dropout"),
)
_BAT: Final = (
    "changes the weight in proportion to itself, so its folded rank would be min(in, out); retrain "
    "with init_weights=true"
)


def read_miss(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read a MiSS; a `FormatReader`."""
    return _read(folder, base, "miss")


def read_bone(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read a Bone; a `FormatReader`."""
    return _read(folder, base, "bone")


def _read(folder: PeftFolder, base: BaseModel, kind: str) -> AdapterWeights:
    reading = FoldedReading(folder, base, FIELDS, own_bias=f"{kind}_only")
    fields = folder.config
    rank, mini_rank = fields.positive_int("r", 64), fields.positive_int("mini_r", 1)
    init = fields.raw("init_weights", True)
    if init == "bat":
        fields.refuse("init_weights", _BAT)
    elif init != "mini" and not isinstance(init, bool):
        fields.refuse("init_weights", "known are true, false, 'mini' and 'bat'")
    folds = []
    for group in folder.linears((f"{kind}_block",), rule=reading.rule):
        num_in, num_out = reading.shape(group.linear)
        if init == "bat":
            folder.ignore(group.names[f"{kind}_block"], "not read, because of init_weights")
            continue
        if init == "mini" and num_out % mini_rank:
            folder.ledger.refuse(f"mini_r={mini_rank} does not divide it", group.linear.module)
            continue
        shape = rank, mini_rank if init == "mini" else num_out
        block = folder.take(group.names[f"{kind}_block"], shape, fold="B, beside an A of 0 and 1")
        if rank > num_in:
            folder.ledger.refuse(f"r={rank} is more than it has inputs", group.linear.module)
            continue
        compute = partial(fold_miss, block, num_in=num_in, num_out=num_out)
        folds.append(PlannedFold(group.linear, rank, compute))
    return reading.finish(folds)
