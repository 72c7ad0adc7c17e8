"""`peft_type=POLY`: one of its tasks, folded into a LoRA."""

from __future__ import annotations

from functools import partial
from typing import Final

from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.folds.poly import fold_poly
from loraplex_server.adapters.formats.field_table import FieldTable
from loraplex_server.adapters.formats.folded import FoldedReading, PlannedFold
from loraplex_server.adapters.formats.folder import PeftFolder
from loraplex_server.adapters.formats.tasks import FIELD as TASK
from loraplex_server.adapters.formats.tasks import read_task

_COUNTS: Final = ("r", "n_tasks", "n_skills", "n_splits")
FIELDS: Final = FieldTable(
    frozenset(
        {*_COUNTS, "target_modules", "exclude_modules", "modules_to_save", "poly_type", TASK}
    ),
    {"init_weights": "initialisation only"},
)
_SUFFIXES: Final = ("poly_lora_A", "poly_lora_B", "poly_router.module_logits")


def read_poly(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read one task of a Poly or MHR; a `FormatReader`."""
    reading = FoldedReading(folder, base, FIELDS)
    fields = folder.config
    rank, tasks = fields.positive_int("r", 8), fields.positive_int("n_tasks", 1)
    skills, splits = fields.positive_int("n_skills", 4), fields.positive_int("n_splits", 1)
    fields.choice("poly_type", ("poly",), "poly")
    task = read_task(fields, tasks, "n_tasks")
    folds = []
    for group in folder.linears(_SUFFIXES, rule=reading.rule):
        num_in, num_out = reading.shape(group.linear)
        if num_in % splits or num_out % splits:
            folder.ledger.refuse(f"n_splits={splits} does not divide it", group.linear.module)
            continue
        shapes = (
            (splits, skills, num_in // splits, rank),
            (splits, skills, rank, num_out // splits),
            (tasks, splits * skills),
        )
        a, b, logits = (
            folder.take(group.names[suffix], shape, fold=f"mixed as task {task} does")
            for suffix, shape in zip(_SUFFIXES, shapes, strict=True)
        )
        folds.append(PlannedFold(group.linear, rank, partial(fold_poly, a, b, logits[task])))
    return reading.finish(folds)
