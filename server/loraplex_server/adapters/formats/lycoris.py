"""`peft_type=LOHA` and `LOKR`."""

from __future__ import annotations

from functools import partial
from typing import Final

import torch

from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.folds.hadamard import fold_hadamard
from loraplex_server.adapters.folds.kronecker import (
    fold_kronecker,
    kronecker_rank,
    split_matrix,
)
from loraplex_server.adapters.formats.field_table import dropout, linear_fields
from loraplex_server.adapters.formats.folded import FoldedReading, PlannedFold
from loraplex_server.adapters.formats.folder import LinearTensors, PeftFolder
from loraplex_server.adapters.formats.rank_rule import RankRule

_OWN: Final = ("r", "alpha", "rank_pattern", "alpha_pattern")
_NO_EFFECT: Final = {
    "use_effective_conv2d": "about convolutions",
    **dropout("rank_dropout", "module_dropout"),
}
LOHA_FIELDS: Final = linear_fields(*_OWN, without=("bias", "fan_in_fan_out"), no_effect=_NO_EFFECT)
LOKR_FIELDS: Final = linear_fields(
    *_OWN,
    without=("bias", "fan_in_fan_out"),
    no_effect={
        **_NO_EFFECT,
        "decompose_both": "the tensors tell",
        "decompose_factor": "the shapes of the tensors tell",
        **dropout("rank_dropout_scale"),
    },
)
_LOHA: Final = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def read_loha(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read a LoHa; a `FormatReader`."""
    reading = FoldedReading(folder, base, LOHA_FIELDS)
    rule = _rank_rule(folder)
    folds = []
    for group in folder.linears(_LOHA, rule=reading.rule):
        num_in, num_out = reading.shape(group.linear)
        rank, scale = rule.rank_of(group.linear.module), rule.scale_of(group.linear.module)
        shapes = ((num_out, rank), (rank, num_in)) * 2
        w1_a, w1_b, w2_a, w2_b = (
            folder.take(group.names[name], shape, fold="an elementwise product at rank r * r")
            for name, shape in zip(_LOHA, shapes, strict=True)
        )
        compute = partial(fold_hadamard, (w1_a, w1_b), (w2_a, w2_b), scale=scale)
        folds.append(PlannedFold(group.linear, rank * rank, compute))
    return reading.finish(folds)


def read_lokr(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read a LoKr; a `FormatReader`."""
    reading = FoldedReading(folder, base, LOKR_FIELDS)
    rule = _rank_rule(folder)
    suffixes = [f"lokr_w{i}{side}" for i in "12" for side in ("", "_a", "_b")]
    folds = []
    for group in folder.linears(suffixes, required=(), rule=reading.rule):
        rank, scale = rule.rank_of(group.linear.module), rule.scale_of(group.linear.module)
        first, second = (_take_matrix(folder, group, f"lokr_w{i}", rank) for i in "12")
        if first is None or second is None:
            continue
        rows, columns = (
            first[0].shape[0] * second[0].shape[0],
            first[1].shape[1] * second[1].shape[1],
        )
        num_in, num_out = reading.shape(group.linear)
        if (rows, columns) != (num_out, num_in):
            folder.ledger.refuse(
                f"its Kronecker product is {[rows, columns]} where the base needs "
                f"{[num_out, num_in]}",
                group.linear.module,
            )
            continue
        compute = partial(fold_kronecker, first, second, scale=scale)
        folds.append(PlannedFold(group.linear, kronecker_rank(first, second), compute))
    return reading.finish(folds)


def _rank_rule(folder: PeftFolder) -> RankRule:
    folder.config.must_be_off({"use_rslora": "PEFT's LyCORIS adapters have no such option"})
    return folder.config.rank_rule(alpha="alpha")


def _take_matrix(
    folder: PeftFolder, group: LinearTensors, stem: str, rank: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return one of the two matrices in two thin ones, `[m, R]` and `[R, n]`, if it is there."""
    how = "a Kronecker product at the product of the ranks"
    names = [group.names.get(f"{stem}{side}") for side in ("", "_a", "_b")]
    whole, left, right = names
    if whole is not None and left is None and right is None:
        if len(folder.shape(whole)) != 2:
            folder.refuse(whole, "is no matrix")
            return None
        matrix = folder.take(whole, fold=how)
        return None if folder.ledger else split_matrix(matrix)
    if left is None or right is None or whole is not None:
        folder.ledger.refuse(f"needs {stem}, or both {stem}_a and {stem}_b", group.linear.module)
        return None
    sizes = (folder.shape(left) or (0,))[0], (folder.shape(right) or (0,))[-1]
    return folder.take(left, (sizes[0], rank), fold=how), folder.take(
        right, (rank, sizes[1]), fold=how
    )
