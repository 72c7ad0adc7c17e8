"""`peft_type=TRAINABLE_TOKENS`: rows of the embedding, and of the head where it has some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.formats.field_table import FieldTable
from loraplex_server.adapters.formats.folder import PeftFolder
from loraplex_server.adapters.formats.linears import PREFIX
from loraplex_server.adapters.formats.token_rows import Rows, take_rows, token_rows

FIELDS: Final = FieldTable(
    # The tensors tell which of embedding and head have rows.
    frozenset({"token_indices", "target_modules"}),
    {"init_weights": "initialisation only"},
)
_DELTA: Final = "trainable_tokens_delta"
_EMBEDDING: Final = f"{PREFIX}model.embed_tokens.{_DELTA}"
_HEAD: Final = f"{PREFIX}lm_head.{_DELTA}"
#: What PEFT also writes of a tied head that target_modules names.
_HEAD_TWIN: Final = f"{PREFIX}lm_head.base_layer.{_DELTA}"


def read_trainable_tokens(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read rows of tokens; a `FormatReader`."""
    FIELDS.account(folder.config)
    folder.config.names("target_modules")
    ids = folder.config.int_list("token_indices", below=base.vocab_size) or ()
    if not ids or len(set(ids)) < len(ids):
        folder.config.refuse("token_indices", "needs different token ids")
        return AdapterWeights()
    embedding = _take(folder, base, _EMBEDDING, ids)
    head = _take(folder, base, _HEAD, ids)
    if base.tie_word_embeddings and embedding[1] is not None:
        _check_twins(folder, ids, embedding)
        head = embedding
    rows = token_rows(embedding, head)
    return AdapterWeights(
        parts=rows.parts, token_ids=rows.token_ids, head_token_ids=rows.head_token_ids
    )


def _take(folder: PeftFolder, base: BaseModel, name: str, ids: Sequence[int]) -> Rows:
    return take_rows(folder, base, name, ids) if folder.has(name) else ((), None)


def _check_twins(folder: PeftFolder, ids: Sequence[int], embedding: Rows) -> None:
    """Refuse rows of a tied head that are not the embedding's: PEFT has only one set of them."""
    for name in (_HEAD, _HEAD_TWIN):
        if not folder.has(name) or embedding[1] is None:
            continue
        rows = folder.take(name, tuple(embedding[1].shape))
        order = sorted(range(len(ids)), key=ids.__getitem__)
        if not folder.ledger and not torch.equal(rows[order], embedding[1]):
            folder.refuse(name, "differs from the embedding's rows, but the head is tied to them")
