"""`peft_type=PREFIX_TUNING` and `CARTRIDGE`: keys and values that stand before every prompt.

PEFT saves keys and values themselves; those of a prefix with a projection are what the projection
gave. Keys are put into the cache as they are, without a rotation.
"""

from __future__ import annotations

from typing import Final

from loraplex_memory.adapter_spec import KV_PREFIX
from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.folds.prompts import split_prefix
from loraplex_server.adapters.formats.field_table import FieldTable
from loraplex_server.adapters.formats.folder import PeftFolder

_APPLIED: Final = frozenset(
    {
        "num_virtual_tokens",
        "token_dim",
        "num_transformer_submodules",
        "num_attention_heads",
        "num_layers",
    }
)
_OFF: Final = {"modules_to_save": "PEFT saves no modules beside a prefix; save it again without"}
_TRAINING: Final = "how the prefix was trained; the file holds the result"
PREFIX_FIELDS: Final = FieldTable(
    _APPLIED,
    dict.fromkeys(("init_weights", "encoder_hidden_size", "prefix_projection"), _TRAINING),
    _OFF,
)
CARTRIDGE_FIELDS: Final = FieldTable(_APPLIED, {"num_frozen_tokens": _TRAINING}, _OFF)


def read_prefix(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read a prefix, projected or not; a `FormatReader`."""
    PREFIX_FIELDS.account(folder.config)
    return _read(folder, base)


def read_cartridge(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read a cartridge; a `FormatReader`."""
    CARTRIDGE_FIELDS.account(folder.config)
    return _read(folder, base)


def _read(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    geometry = base.geometry
    expected = {
        "num_layers": geometry.num_layers,
        "num_attention_heads": geometry.num_kv_heads,
        "token_dim": geometry.num_kv_heads * geometry.head_dim,
        "num_transformer_submodules": 1,
    }
    for field, value in expected.items():
        if folder.config.raw(field) not in (None, value):
            folder.config.refuse(field, f"keys and values of the base need {value}")
    num_tokens = folder.config.positive_int("num_virtual_tokens", 1)
    shape = num_tokens, geometry.num_layers * geometry.kv_elems_per_token
    prefix = folder.take("prompt_embeddings", shape, fold="cut into keys and values of each layer")
    if folder.ledger:
        return AdapterWeights()
    layers = split_prefix(prefix, geometry.num_layers)
    return AdapterWeights(parts={(KV_PREFIX, at): layer for at, layer in enumerate(layers)})
