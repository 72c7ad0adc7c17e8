"""Trained rows of single tokens (`trainable_token_indices`): they replace rows of the embedding.

With a tied head, PEFT lets the rows of the embedding replace the head's too, unless the
configuration gives the head rows of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from loraplex_memory.adapter_spec import HEAD_ROWS, TOKEN_ROWS
from loraplex_memory.adapter_weights import PartKey
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.formats.folder import PeftFolder
from loraplex_server.adapters.formats.linears import PREFIX

FIELD: Final = "trainable_token_indices"
_EMBEDDING: Final = "model.embed_tokens"
_HEAD: Final = "lm_head"
_SUFFIX: Final = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class TokenRows:
    """Rows of the embedding and of the head, in ascending order of their tokens."""

    parts: dict[PartKey, torch.Tensor] = field(default_factory=dict)
    token_ids: tuple[int, ...] = ()
    head_token_ids: tuple[int, ...] = ()


def read_token_rows(folder: PeftFolder, base: BaseModel) -> TokenRows:
    """Read the field and the rows it names."""
    chosen = _indices(folder, base)
    embedding = _take(folder, base, _EMBEDDING, chosen.get(_EMBEDDING, ()))
    head_ids = chosen.get(_HEAD, ())
    is_tied = base.tie_word_embeddings and bool(chosen.get(_EMBEDDING))
    if is_tied and (not head_ids or head_ids == chosen[_EMBEDDING]):
        return token_rows(embedding, embedding)
    return token_rows(embedding, _take(folder, base, _HEAD, head_ids))


#: Token ids, ascending, and their rows `[m, H]`.
Rows = tuple[tuple[int, ...], torch.Tensor | None]


def token_rows(embedding: Rows, head: Rows) -> TokenRows:
    """Return the parts of rows; `head` may be the same rows as `embedding`."""
    parts: dict[PartKey, torch.Tensor] = {}
    if embedding[1] is not None:
        parts[TOKEN_ROWS, None] = embedding[1]
    if head[1] is not None:
        # One file cannot hold one tensor under two names.
        parts[HEAD_ROWS, None] = head[1].clone() if head[1] is embedding[1] else head[1]
    return TokenRows(parts, embedding[0], head[0])


def take_rows(folder: PeftFolder, base: BaseModel, name: str, ids: Sequence[int]) -> Rows:
    """Take the rows `[m, H]` of these tokens, and put them in ascending order."""
    rows = folder.take(name, (len(ids), base.geometry.hidden_size))
    order = sorted(range(len(ids)), key=ids.__getitem__)
    if order == list(range(len(ids))):
        return tuple(ids), rows
    return tuple(ids[at] for at in order), rows[order]


def _take(folder: PeftFolder, base: BaseModel, module: str, ids: Sequence[int]) -> Rows:
    if not ids:
        return (), None
    return take_rows(folder, base, f"{PREFIX}{module}.{_SUFFIX}", ids)


def _indices(folder: PeftFolder, base: BaseModel) -> dict[str, tuple[int, ...]]:
    """Return the field's token ids by module, in the order of the file's rows."""
    value: Any = folder.config.raw(FIELD)
    if value is None:
        return {}
    by_name = value if isinstance(value, dict) else {"embed_tokens": value}
    found: dict[str, tuple[int, ...]] = {}
    for name, ids in by_name.items():
        module = next((m for m in (_EMBEDDING, _HEAD) if m.endswith(name) and name), None)
        if module is None or module in found:
            folder.config.refuse(FIELD, "only embed_tokens and lm_head have rows of tokens")
        elif not _are_tokens(ids, base.vocab_size):
            folder.config.refuse(
                FIELD, f"needs lists of different token ids below {base.vocab_size}"
            )
        else:
            found[module] = tuple(ids)
    return found


def _are_tokens(ids: object, vocab_size: int) -> bool:
    return (
        isinstance(ids, list)
        and all(type(i) is int and 0 <= i < vocab_size for i in ids)
        and len(set(ids)) == len(ids)
    )
