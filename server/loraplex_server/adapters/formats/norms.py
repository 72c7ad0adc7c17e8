"""`peft_type=LN_TUNING`: norms trained in full."""

from __future__ import annotations

from typing import Final

from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.formats.field_table import FieldTable
from loraplex_server.adapters.formats.folder import PeftFolder
from loraplex_server.adapters.formats.linears import PREFIX
from loraplex_server.adapters.formats.whole_modules import (
    norm_part,
    read_whole_modules,
    take_norm,
)

FIELDS: Final = FieldTable(frozenset({"target_modules", "exclude_modules", "modules_to_save"}))
_SUFFIX: Final = ".ln_tuning_layers.weight"


def read_ln_tuning(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read norms; a `FormatReader`. A linear copied in the same way is refused by name."""
    FIELDS.account(folder.config)
    rule = folder.config.target_rule()
    parts = read_whole_modules(folder, base)
    keys = folder.keys()
    for key in keys:
        if not (key.startswith(PREFIX) and key.endswith(_SUFFIX)):
            continue
        module = key[len(PREFIX) : -len(_SUFFIX)]
        part = norm_part(base, module)
        if part is None:
            folder.refuse(key, "is no norm of the base; retrain with LoRA on other modules")
        elif not rule.covers(module, part[1] if part[1] is not None else -1):
            folder.refuse(key, "target_modules leaves it out, so PEFT would not load it")
        elif part in parts:
            folder.refuse(key, "given twice: modules_to_save names it too")
        else:
            parts[part] = take_norm(folder, base, key, part)
    return AdapterWeights(parts=parts)
