"""`peft_type=VBLORA`: files of all logits, or of the chosen vectors only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import torch

from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.folds.factors import Factors
from loraplex_server.adapters.folds.vblora import (
    complete_weights,
    fold_vblora,
    mix,
    top_k_weights,
)
from loraplex_server.adapters.formats.field_table import dropout, linear_fields
from loraplex_server.adapters.formats.folded import FoldedReading, PlannedFold
from loraplex_server.adapters.formats.folder import LinearTensors, PeftFolder

FIELDS: Final = linear_fields(
    "r",
    "num_vectors",
    "vector_length",
    "topk",
    "save_only_topk_weights",
    without=("init_weights",),
    no_effect={
        "init_vector_bank_bound": "initialisation only",
        "init_logits_std": "initialisation only",
        **dropout("vblora_dropout"),
    },
)
_BANK: Final = "base_model.vblora_vector_bank"
_HOW: Final = "mixed from the bank"


def read_vblora(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read a VB-LoRA; a `FormatReader`."""
    reading = FoldedReading(folder, base, FIELDS, own_bias="vblora_only")
    fields = folder.config
    rank = fields.positive_int("r", 4)
    length = fields.positive_int("vector_length", 256)
    num_vectors, k = fields.positive_int("num_vectors", 256), fields.positive_int("topk", 2)
    if k > num_vectors:
        fields.refuse("topk", f"is more than the bank has ({num_vectors})")
    bank = folder.take(_BANK, (num_vectors, length), fold=_HOW)
    only_top_k = fields.flag("save_only_topk_weights")
    stems = [f"vblora_logits_{side}" for side in "AB"]
    kinds = ("_topk_indices", "_topk_weights") if only_top_k else ("",)
    folds = []
    suffixes = [stem + kind for stem in stems for kind in kinds]
    for group in folder.linears(suffixes, rule=reading.rule):
        num_in, num_out = reading.shape(group.linear)
        if num_in % length or num_out % length:
            folder.ledger.refuse(f"is no multiple of vector_length={length}", group.linear.module)
            continue
        shapes = (rank, num_in // length), (num_out // length, rank)
        take = _take_chosen if only_top_k else _take_logits
        mixtures: list[_Mixture] = [
            take(folder, group, stem, shape, num_vectors, k)
            for stem, shape in zip(stems, shapes, strict=True)
        ]
        folds.append(PlannedFold(group.linear, rank, partial(_fold, bank, mixtures)))
    return reading.finish(folds)


#: Gives indices into the bank and weights, of A's pieces or of B's: many times what is stored.
_Mixture = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def _fold(bank: torch.Tensor, mixtures: list[_Mixture]) -> Factors:
    a, b = (mix(bank, *mixture()) for mixture in mixtures)
    return fold_vblora(a, b)


def _take_logits(
    folder: PeftFolder,
    group: LinearTensors,
    stem: str,
    shape: tuple[int, int],
    num_vectors: int,
    k: int,
) -> _Mixture:
    logits = folder.take(group.names[stem], (*shape, num_vectors), fold=_HOW)
    return partial(top_k_weights, logits, k)


def _take_chosen(
    folder: PeftFolder,
    group: LinearTensors,
    stem: str,
    shape: tuple[int, int],
    num_vectors: int,
    k: int,
) -> _Mixture:
    name = group.names[f"{stem}_topk_indices"]
    indices = folder.take_ints(name, (*shape, k), fold=_HOW)
    weights = folder.take(group.names[f"{stem}_topk_weights"], (*shape, k - 1), fold=_HOW)
    if not folder.ledger and not 0 <= int(indices.min()) <= int(indices.max()) < num_vectors:
        folder.refuse(name, f"points outside the bank of {num_vectors}")
    return lambda: (indices, complete_weights(weights))
