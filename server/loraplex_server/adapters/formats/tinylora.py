"""`peft_type=TINYLORA`: which linears share a vector follows from their order in the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Final

import torch

from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.folds.factors import Factors
from loraplex_server.adapters.folds.latent import (
    draw_tiny_projections,
    fold_latent,
    tied_group,
    tiny_latent,
)
from loraplex_server.adapters.formats.field_table import dropout, linear_fields
from loraplex_server.adapters.formats.folded import FoldedReading, PlannedFold
from loraplex_server.adapters.formats.folder import LinearTensors, PeftFolder
from loraplex_server.adapters.formats.model_order import linears_in_order

FIELDS: Final = linear_fields(
    "r",
    "u",
    "weight_tying",
    "projection_seed",
    "save_projection",
    without=("exclude_modules",),
    no_effect={"init_v_bound": "initialisation only", **dropout("tinylora_dropout")},
)
_A: Final = "tinylora_A"
_B: Final = "tinylora_B"
_P: Final = "tinylora_P"
#: Elements of the projections of one linear.
_MAX_DRAWN: Final = 1 << 26
_HOW: Final = "B times the sum of v_i P_i"


def read_tinylora(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read a TinyLoRA; a `FormatReader`."""
    reading = FoldedReading(folder, base, FIELDS, own_bias="tinylora_only")
    fields = folder.config
    rank, num_vectors = fields.positive_int("r", 2), fields.positive_int("u", 64)
    tying = fields.number("weight_tying", 0.0)
    if not 0.0 <= tying <= 1.0:
        fields.refuse("weight_tying", "must be from 0 to 1")
    seed = _seed(folder)
    groups = _in_order(folder, reading)
    folds = []
    for index, group in enumerate(groups):
        num_in, num_out = reading.shape(group.linear)
        own_rank = min(rank, num_in, num_out)
        a = folder.take(group.names[_A], (own_rank, num_in), fold=_HOW)
        b = folder.take(group.names[_B], (num_out, own_rank), fold=_HOW)
        vector = tied_group(index, len(groups), tying)
        v = folder.take(f"base_model.tinylora_v.{vector}", (num_vectors,), fold=_HOW)
        draw = partial(draw_tiny_projections, seed + index, num_vectors=num_vectors, rank=own_rank)
        p = _take_projections(folder, group, (num_vectors, own_rank, own_rank))
        folds.append(PlannedFold(group.linear, own_rank, partial(_fold, a, b, v, p, draw)))
    return reading.finish(folds)


def _fold(
    a: torch.Tensor,
    b: torch.Tensor,
    v: torch.Tensor,
    p: torch.Tensor | None,
    draw: Callable[[], torch.Tensor],
) -> Factors:
    return fold_latent(a, b, tiny_latent(v, draw() if p is None else p))


def _in_order(folder: PeftFolder, reading: FoldedReading) -> list[LinearTensors]:
    """Return the linears in the model's order; one that is none of these stays, and is refused."""
    groups = folder.linears((_A, _B, _P), required=(_A, _B), rule=reading.rule)
    by_linear = {group.linear: group for group in groups}
    return [by_linear[linear] for linear in linears_in_order(reading.base) if linear in by_linear]


def _seed(folder: PeftFolder) -> int:
    seed = folder.config.raw("projection_seed", 42)
    if type(seed) is int and 0 <= seed < 1 << 62:
        return seed
    folder.config.refuse("projection_seed", "must be a whole number of at least 0")
    return 0


def _take_projections(
    folder: PeftFolder, group: LinearTensors, shape: tuple[int, int, int]
) -> torch.Tensor | None:
    """Return P `[U, R, R]` as stored; None where it is to be drawn, or after a fault."""
    name = group.names.get(_P)
    if folder.config.flag("save_projection", default=True):
        if name is not None:
            return folder.take(name, shape, fold=_HOW)
        folder.ledger.refuse("has no tinylora_P", group.linear.module)
    elif name is not None:
        folder.refuse(name, "is in the file though save_projection=false; set it to true")
    elif math.prod(shape) > _MAX_DRAWN:
        folder.ledger.refuse("has too many projections to draw; save them (save_projection=true)")
    return None
