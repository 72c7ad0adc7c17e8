"""Linears whose update is folded into a LoRA pair: what all such readers share.

A reader takes all tensors first and plans one fold for each linear. Only when nothing has been
refused are the folds computed, one after the other, each written again at its true rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from loraplex_memory.adapter_weights import AdapterWeights, LoRAPair, ModuleKey
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.folds.factors import Factors
from loraplex_server.adapters.folds.recompress import recompress
from loraplex_server.adapters.formats.biases import BiasMode, read_bias_mode, read_biases, shifts
from loraplex_server.adapters.formats.field_table import FieldTable
from loraplex_server.adapters.formats.folder import PeftFolder, show_bytes
from loraplex_server.adapters.formats.linears import Linear
from loraplex_server.adapters.formats.whole_modules import read_whole_modules
from loraplex_server.adapters.peft_targets import TargetRule

_BYTES_PER_ELEMENT: Final = 2
#: What the factors of one linear may take before they are written again at their true rank.
_MAX_FOLD_BYTES: Final = 1 << 30


@dataclass(frozen=True)
class PlannedFold:
    """One linear's fold.

    Attributes:
        rank: of the factors that the fold computes; the update's own may be smaller.
        compute: the fold of tensors that have been taken and checked.
    """

    linear: Linear
    rank: int
    compute: Callable[[], Factors]


class FoldedReading:
    """The part of a reading that does not depend on the kind; owned by it."""

    def __init__(
        self, folder: PeftFolder, base: BaseModel, table: FieldTable, *, own_bias: str | None = None
    ) -> None:
        """Account for the fields that all kinds have.

        Args:
            own_bias: what the field `bias` calls "those of the adapted linears"; None for a kind
                without the field.
        """
        self.folder = folder
        self.base = base
        self.fields = folder.config
        table.account(self.fields)
        self.rule: TargetRule = self.fields.target_rule()
        self._bias_mode: BiasMode = "none"
        if own_bias is not None:
            self._bias_mode = read_bias_mode(self.fields, own=own_bias)

    def shape(self, linear: Linear) -> tuple[int, int]:
        """Return `(in, out)` of a linear."""
        geometry = self.base.geometry
        return linear.in_features(geometry), linear.out_features(geometry)

    def finish(self, folds: Sequence[PlannedFold]) -> AdapterWeights:
        """Read what stands beside the linears, then fold them all, unless something is refused."""
        parts = read_whole_modules(self.folder, self.base)
        parts |= shifts(self.base, read_biases(self.folder, self.base, self._bias_mode))
        self._refuse_large(folds)
        if self.folder.ledger:
            return AdapterWeights()
        lora: dict[ModuleKey, LoRAPair] = {}
        for fold in folds:
            a, b = recompress(*fold.compute())
            lora |= fold.linear.split_pair(a, b, 1.0, self.base.geometry)
        return AdapterWeights(lora, parts)

    def _refuse_large(self, folds: Sequence[PlannedFold]) -> None:
        """Refuse ranks above the limit before anything of that size is computed."""
        limit = self.folder.limits.max_rank
        ranks = {fold.linear: min(fold.rank, *self.shape(fold.linear)) for fold in folds}
        size = sum(rank * sum(self.shape(linear)) for linear, rank in ranks.items())
        for fold in folds:
            linear, rank = fold.linear, ranks[fold.linear]
            if fold.rank * sum(self.shape(linear)) * 8 > _MAX_FOLD_BYTES:
                self.folder.ledger.refuse(
                    f"folding rank {fold.rank} would take more than {show_bytes(_MAX_FOLD_BYTES)} "
                    "of memory; retrain with a smaller rank",
                    linear.module,
                )
            elif rank > limit:
                self.folder.ledger.refuse(
                    f"folded rank {rank} is above the limit of {limit} (the whole adapter would "
                    f"take {show_bytes(size * _BYTES_PER_ELEMENT)} at 16 bits); retrain with a "
                    "smaller rank",
                    linear.module,
                )
