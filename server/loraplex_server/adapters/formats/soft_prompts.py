"""Prompt tuning of all kinds: embeddings that stand before every prompt.

PEFT saves the embeddings themselves: what an encoder made of them (`P_TUNING`) or a projection
(`CPT`) is in the file already, and their fields only say how they were trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from loraplex_memory.adapter_spec import SOFT_PROMPT
from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.folds.prompts import fold_multitask_prompt
from loraplex_server.adapters.formats.config_fields import ConfigFields
from loraplex_server.adapters.formats.field_table import FieldTable
from loraplex_server.adapters.formats.folder import PeftFolder
from loraplex_server.adapters.formats.tasks import FIELD as TASK
from loraplex_server.adapters.formats.tasks import read_task

_PROMPT: Final = "prompt_embeddings"
_TRAINING: Final = "how the prompt was trained; the file holds the result"
_SHAPE: Final = {
    "num_attention_heads": "the prompt is embeddings, not keys",
    "num_layers": "the prompt is embeddings, not keys",
}
_INIT: Final = (
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
)
_CPT: Final = (
    "cpt_token_ids",
    "cpt_mask",
    "cpt_tokens_type_mask",
    "opt_weighted_loss_type",
    "opt_loss_decay_factor",
    "opt_projection_epsilon",
    "opt_projection_format_epsilon",
    "tokenizer_name_or_path",
)
_ENCODER: Final = (
    "encoder_reparameterization_type",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_dropout",
)


def _table(*training: str, applied: tuple[str, ...] = ()) -> FieldTable:
    return FieldTable(
        frozenset({"num_virtual_tokens", "token_dim", "num_transformer_submodules", *applied}),
        {**_SHAPE, **dict.fromkeys(training, _TRAINING)},
        {"modules_to_save": "PEFT saves no modules beside a prompt; save it again without"},
    )


PROMPT_FIELDS: Final = _table(*_INIT)
P_TUNING_FIELDS: Final = _table(*_ENCODER)
CPT_FIELDS: Final = _table(*_CPT)
MULTITASK_FIELDS: Final = _table(
    *_INIT,
    "prompt_tuning_init_state_dict_path",
    "prompt_tuning_init_task",
    applied=("num_ranks", "num_tasks", TASK),
)
_TABLES: Final[Mapping[str, FieldTable]] = {
    "PROMPT_TUNING": PROMPT_FIELDS,
    "P_TUNING": P_TUNING_FIELDS,
    "CPT": CPT_FIELDS,
}


def read_soft_prompt(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read a prompt of one task; a `FormatReader`."""
    _TABLES[folder.config.peek("peft_type")].account(folder.config)
    shape = _read_shape(folder.config, base)
    prompt = folder.take(_PROMPT, shape)
    return AdapterWeights(parts={(SOFT_PROMPT, None): prompt})


def read_multitask_prompt(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read one task of a multitask prompt; a `FormatReader`."""
    fields = folder.config
    MULTITASK_FIELDS.account(fields)
    num_tokens, width = _read_shape(fields, base)
    ranks, tasks = fields.positive_int("num_ranks", 1), fields.positive_int("num_tasks", 1)
    task = read_task(fields, tasks, "num_tasks")
    how = f"multiplied together for task {task}"
    shared = folder.take(_PROMPT, (num_tokens, width), fold=how)
    columns = folder.take("prefix_task_cols", (tasks, num_tokens, ranks), fold=how)
    rows = folder.take("prefix_task_rows", (tasks, ranks, width), fold=how)
    if folder.ledger:
        return AdapterWeights()
    prompt = fold_multitask_prompt(shared, columns[task], rows[task])
    return AdapterWeights(parts={(SOFT_PROMPT, None): prompt.to(torch.float32)})


def _read_shape(fields: ConfigFields, base: BaseModel) -> tuple[int, int]:
    """Return the shape `[n, H]` of a prompt."""
    width = base.geometry.hidden_size
    if fields.raw("token_dim", width) not in (None, width):
        fields.refuse("token_dim", f"the base's embeddings have {width} elements")
    if fields.raw("num_transformer_submodules", 1) not in (None, 1):
        fields.refuse("num_transformer_submodules", "a decoder has one")
    return fields.positive_int("num_virtual_tokens", 1), width
