"""`peft_type=UNILORA`: the indices are in the file, or are drawn again."""

from __future__ import annotations

from functools import partial
from typing import Final

import torch

from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.folds.unilora import Assignment, draw_assignments, fold_unilora
from loraplex_server.adapters.formats.field_table import dropout, linear_fields
from loraplex_server.adapters.formats.folded import FoldedReading, PlannedFold
from loraplex_server.adapters.formats.folder import LinearTensors, PeftFolder
from loraplex_server.adapters.formats.linears import Linear
from loraplex_server.adapters.formats.model_order import linears_in_order

FIELDS: Final = linear_fields(
    "r",
    "proj_seed",
    "theta_d_length",
    "save_indices",
    without=("exclude_modules",),
    no_effect={"init_theta_d_bound": "initialisation only", **dropout("unilora_dropout")},
)
_THETA: Final = "base_model.unilora_theta_d"
_HOW: Final = "its numbers gathered into A and B"
#: Indices of all linears, which are drawn at once.
_MAX_DRAWN: Final = 1 << 27
_SUFFIXES: Final = tuple(f"unilora_{kind}_{s}" for kind in ("indices", "scales") for s in "AB")


def read_unilora(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read a Uni-LoRA; a `FormatReader`."""
    reading = FoldedReading(folder, base, FIELDS, own_bias="unilora_only")
    fields = folder.config
    rank, length = fields.positive_int("r", 4), fields.positive_int("theta_d_length", 256)
    theta = folder.take(_THETA, (length,), fold=_HOW)
    if fields.flag("save_indices"):
        fields.without_effect({"proj_seed": "the file holds the indices"})
        assigned = {
            group.linear: _take(folder, reading, group, rank, length)
            for group in folder.linears(_SUFFIXES, rule=reading.rule)
        }
    else:
        assigned = _draw(folder, reading, rank, length)
    folds = [
        PlannedFold(linear, rank, partial(fold_unilora, theta, assignment))
        for linear, assignment in assigned.items()
    ]
    return reading.finish(folds)


def _take(
    folder: PeftFolder, reading: FoldedReading, group: LinearTensors, rank: int, length: int
) -> Assignment:
    num_in, num_out = reading.shape(group.linear)
    shapes = (rank, num_in), (num_out, rank)
    indices = [
        _take_indices(folder, group.names[f"unilora_indices_{side}"], shape, length)
        for side, shape in zip("AB", shapes, strict=True)
    ]
    scales = [
        folder.take(group.names[f"unilora_scales_{side}"], shape, fold=_HOW)
        for side, shape in zip("AB", shapes, strict=True)
    ]
    return Assignment(indices[0], indices[1], scales[0], scales[1])


def _take_indices(
    folder: PeftFolder, name: str, shape: tuple[int, int], length: int
) -> torch.Tensor:
    indices = folder.take_ints(name, shape, fold=_HOW)
    if not folder.ledger and not 0 <= int(indices.min()) <= int(indices.max()) < length:
        folder.refuse(name, f"points outside the {length} shared numbers")
    return indices


def _draw(
    folder: PeftFolder, reading: FoldedReading, rank: int, length: int
) -> dict[Linear, Assignment]:
    """Draw the indices of all linears that the configuration names: the file names none."""
    seed = folder.config.raw("proj_seed", 42)
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        folder.config.refuse("proj_seed", "must be a whole number of at least 0")
    way_out = "so which indices belong to what is not known; save with save_indices=true"
    if not folder.config.is_on("target_modules"):
        folder.config.refuse("target_modules", f"names no modules, {way_out}")
    is_explicit = reading.rule.targets is not None
    if is_explicit and reading.rule.covers("lm_head", reading.base.geometry.num_layers):
        folder.config.refuse("target_modules", f"names the head, {way_out}")
    linears = [
        linear
        for linear in linears_in_order(reading.base)
        if reading.rule.covers(linear.module, linear.layer)
    ]
    if folder.ledger or not all(folder.check_rank(rank, linear.module) for linear in linears):
        return {}
    shapes = [reading.shape(linear) for linear in linears]
    if rank * sum(map(sum, shapes)) > _MAX_DRAWN:
        folder.ledger.refuse("has too many indices to draw; save them (save_indices=true)")
        return {}
    drawn = draw_assignments(shapes, rank=rank, length=length, seed=seed)
    return dict(zip(linears, drawn, strict=True))
