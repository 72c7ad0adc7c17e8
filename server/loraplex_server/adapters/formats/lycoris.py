"""`peft_type=LOHA` and `LOKR`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.folds.hadamard import fold_hadamard
from loraplex_server.adapters.folds.kronecker import fold_kronecker, split_matrix
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
        folds.append(PlannedFold(group.linear, min(rank * rank, num_in, num_out), compute))
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
        product = [one * other for one, other in zip(first.shape, second.shape, strict=True)]
        num_in, num_out = reading.shape(group.linear)
        if product != [num_out, num_in]:
            folder.ledger.refuse(
                f"its Kronecker product is {product} where the base needs {[num_out, num_in]}",
                group.linear.module,
            )
            continue
        compute = partial(fold_kronecker, first.thin, second.thin, scale=scale)
        bound = min(first.rank * second.rank, num_in, num_out)
        folds.append(PlannedFold(group.linear, bound, compute))
    return reading.finish(folds)


@dataclass(frozen=True)
class _Matrix:
    """One of LoKr's two matrices, as the product of two thin ones, `[m, R]` and `[R, n]`."""

    shape: tuple[int, int]
    rank: int
    thin: tuple[torch.Tensor, torch.Tensor]


def _rank_rule(folder: PeftFolder) -> RankRule:
    folder.config.must_be_off({"use_rslora": "PEFT's LyCORIS adapters have no such option"})
    return folder.config.rank_rule(alpha="alpha")


def _take_matrix(folder: PeftFolder, group: LinearTensors, stem: str, rank: int) -> _Matrix | None:
    """Take one of the two matrices, whole or factored; None after a fault."""
    how = "a Kronecker product at the product of the ranks"
    whole, left, right = (group.names.get(f"{stem}{side}") for side in ("", "_a", "_b"))
    if whole is not None and left is None and right is None:
        return _split(folder, folder.take(whole, fold=how), whole)
    if left is None or right is None or whole is not None:
        folder.ledger.refuse(f"needs {stem}, or both {stem}_a and {stem}_b", group.linear.module)
        return None
    rows, columns = (folder.shape(left) or (0,))[0], (folder.shape(right) or (0,))[-1]
    u = folder.take(left, (rows, rank), fold=how)
    v = folder.take(right, (rank, columns), fold=how)
    return _Matrix((rows, columns), rank, (u, v))


def _split(folder: PeftFolder, matrix: torch.Tensor, name: str) -> _Matrix | None:
    if matrix.ndim != 2:
        folder.refuse(name, "is no matrix")
    if folder.ledger:
        return None
    rows, columns = matrix.shape
    if min(rows, columns) > folder.limits.max_rank:
        # Above the limit whatever it holds; it is refused, and a decomposition would take long.
        return _Matrix((rows, columns), min(rows, columns), (matrix, matrix))
    thin = split_matrix(matrix)
    return _Matrix((rows, columns), thin[0].shape[1], thin)
