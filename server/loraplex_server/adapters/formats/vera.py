"""`peft_type=VERA` and `PVERA`."""

from __future__ import annotations

from functools import partial
from typing import Final, Literal

import torch

from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.folds.vera import draw_projections, fold_pvera, fold_vera
from loraplex_server.adapters.formats.field_table import dropout, linear_fields
from loraplex_server.adapters.formats.folded import FoldedReading, PlannedFold
from loraplex_server.adapters.formats.folder import LinearTensors, PeftFolder

VERA_FIELDS: Final = linear_fields(
    "r",
    "projection_prng_key",
    "save_projection",
    without=("exclude_modules",),
    no_effect={"d_initial": "initialisation only", **dropout("vera_dropout")},
)
PVERA_FIELDS: Final = linear_fields(
    "r",
    "projection_prng_key",
    "save_projection",
    without=("exclude_modules",),
    no_effect={
        "d_initial": "initialisation only",
        "generator_seed": "read only when sampling",
        **dropout("pvera_dropout"),
    },
    unsupported={
        "sample_at_inference": "every pass would draw other weights, so there is no one output; "
        "save with sample_at_inference=false to serve the mean"
    },
)


def read_vera(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read a VeRA; a `FormatReader`."""
    return _read(folder, FoldedReading(folder, base, VERA_FIELDS, own_bias="vera_only"), "vera")


def read_pvera(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read a PVeRA that does not sample; a `FormatReader`."""
    return _read(folder, FoldedReading(folder, base, PVERA_FIELDS, own_bias="pvera_only"), "pvera")


def _read(
    folder: PeftFolder, reading: FoldedReading, kind: Literal["vera", "pvera"]
) -> AdapterWeights:
    rank = folder.config.positive_int("r", 256)
    suffixes = (f"{kind}_lambda_b", f"{kind}_lambda_d")
    groups = folder.linears(suffixes, rule=reading.rule)
    if not all(folder.check_rank(rank, group.linear.module) for group in groups):
        return AdapterWeights()
    fold, rows_per_rank = (fold_vera, 1) if kind == "vera" else (fold_pvera, 2)
    shared = _shared(folder, reading, kind, groups, rank, rows_per_rank)
    how = "scales of the shared matrices"
    folds = []
    for group in groups:
        num_in, num_out = reading.shape(group.linear)
        d = folder.take(group.names[f"{kind}_lambda_d"], (rank * rows_per_rank,), fold=how)
        b = folder.take(group.names[f"{kind}_lambda_b"], (num_out,), fold=how)
        folds.append(PlannedFold(group.linear, rank, partial(fold, *shared, d, b, num_in)))
    return reading.finish(folds)


def _shared(
    folder: PeftFolder,
    reading: FoldedReading,
    kind: str,
    groups: list[LinearTensors],
    rank: int,
    rows_per_rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the shared A `[R, in]` and B `[out, R]`, as large as the largest linear needs."""
    shapes = [reading.shape(group.linear) for group in groups]
    num_in, num_out = (max(sizes) for sizes in zip(*shapes, strict=True)) if shapes else (0, 0)
    names = f"base_model.{kind}_A", f"base_model.{kind}_B"
    key = _key(folder)
    if folder.config.flag("save_projection", default=True):
        how = "multiplied by the scales of every linear"
        return (
            folder.take(names[0], (rank * rows_per_rank, num_in), fold=how),
            folder.take(names[1], (num_out, rank), fold=how),
        )
    for name in names:
        if folder.has(name):
            folder.refuse(name, "is in the file though save_projection=false; set it to true")
    if not groups:
        return torch.zeros(0, 0), torch.zeros(0, 0)
    return draw_projections(key, rank, num_in, num_out, rows_per_rank=rows_per_rank)


def _key(folder: PeftFolder) -> int:
    key = folder.config.raw("projection_prng_key", 0)
    if type(key) is int and 0 <= key < 1 << 63:
        return key
    folder.config.refuse("projection_prng_key", "must be a whole number of at least 0")
    return 0
