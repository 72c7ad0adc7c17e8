"""LoRA on the embedding and on the head; with DoRA they are served as whole matrices."""

from __future__ import annotations

from typing import Final

import torch

from loraplex_memory.adapter_spec import (
    EMBEDDING,
    EMBEDDING_A,
    EMBEDDING_B,
    HEAD,
    HEAD_A,
    HEAD_B,
)
from loraplex_memory.adapter_weights import PartKey
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.folds.lora import dora_gain
from loraplex_server.adapters.formats.folder import PeftFolder
from loraplex_server.adapters.formats.linears import PREFIX
from loraplex_server.adapters.formats.lora_fields import LoraFields
from loraplex_server.adapters.formats.lora_tensors import MAGNITUDES

_EMBEDDING: Final = "model.embed_tokens"
_HEAD: Final = "lm_head"
#: `module -> (names of A and B, shape of A without its rank, shape of B without its rank)`.
_SIDES: Final = {
    _EMBEDDING: ("lora_embedding_A", "lora_embedding_B"),
    _HEAD: ("lora_A.weight", "lora_B.weight"),
}

Parts = dict[PartKey, torch.Tensor]


def read_vocabulary_lora(folder: PeftFolder, base: BaseModel, fields: LoraFields) -> Parts:
    """Read the pairs of the embedding and of the head; raises PatternError."""
    parts: Parts = {}
    for module, sides in _SIDES.items():
        names = [f"{PREFIX}{module}.{side}" for side in sides]
        if not any(folder.has(name) for name in names):
            continue
        if fault := _fault(module, base, fields):
            folder.ledger.refuse(fault, module)
            for name in names:
                folder.ledger.tensor(name, "refused", fault)
            continue
        rank = fields.ranks.rank_of(module)
        if folder.check_rank(rank, module):
            parts |= _read(folder, base, fields, module, rank)
    return parts


def _fault(module: str, base: BaseModel, fields: LoraFields) -> str | None:
    """Return why a pair of this module cannot be served, or would not be loaded by PEFT."""
    is_tied = module == _HEAD and fields.is_tied_with_embedding and base.tie_word_embeddings
    # "Every linear" is none of these to PEFT.
    is_covered = fields.targets.targets is not None and (
        fields.targets.covers(module, None) or (is_tied and fields.targets.covers(_EMBEDDING, None))
    )
    if not is_covered:
        return "has tensors, but target_modules leaves it out, so PEFT would not load them"
    if fields.init != "plain":
        return f"init_lora_weights={fields.init!r} is read on linears of the layers only"
    if fields.is_kasa or fields.group_size > 1 or fields.blocks.blocks_of(module) != (1, 1):
        return "this variant of LoRA is read on linears of the layers only"
    if fields.has_lora_bias:
        return "lora_bias is read on linears of the layers only"
    return None


def _read(folder: PeftFolder, base: BaseModel, fields: LoraFields, module: str, rank: int) -> Parts:
    vocab, hidden = base.vocab_size, base.geometry.hidden_size
    rows, columns = (hidden, vocab) if module == _EMBEDDING else (vocab, hidden)
    a_name, b_name = (f"{PREFIX}{module}.{side}" for side in _SIDES[module])
    how = "transposed, times the scale"
    a = folder.take(a_name, (rank, columns), fold=how)
    b = folder.take(b_name, (rows, rank), fold=how)
    scale = fields.ranks.scale_of(module)
    if fields.use_dora:
        return _read_dora(folder, base, module, (a, b), scale)
    lora_a, lora_b = a.T, scale * b.to(torch.float32).T
    a_part, b_part = (EMBEDDING_A, EMBEDDING_B) if module == _EMBEDDING else (HEAD_A, HEAD_B)
    # The head's A stays as it is, `[R, H]`: its input is the hidden state, not a token.
    return {(a_part, None): lora_a if module == _EMBEDDING else a, (b_part, None): lora_b}


def _read_dora(
    folder: PeftFolder,
    base: BaseModel,
    module: str,
    update: tuple[torch.Tensor, torch.Tensor],
    scale: float,
) -> Parts:
    """Return the whole matrix: DoRA scales its rows (head) or columns (embedding)."""
    a, b = (side.to(torch.float32) for side in update)
    names = [f"{PREFIX}{module}.{suffix}" for suffix in MAGNITUDES]
    name = next(filter(folder.has, names), names[0])
    magnitude = folder.take(name, (b.shape[0],), fold="over the norms of W + s B A")
    num_bytes = 4 * base.vocab_size * base.geometry.hidden_size
    if not folder.check_dense(num_bytes, module) or folder.ledger:
        return {}
    weight = base.tensor(f"{module}.weight")
    # The embedding's weight is stored as tokens by hidden units, the other way round.
    oriented = weight.T if module == _EMBEDDING else weight
    gain = dora_gain(oriented, (a, b), scale, magnitude.to(torch.float32))
    whole = gain[:, None] * (oriented + scale * (b @ a))
    if module == _EMBEDDING:
        return {(EMBEDDING, None): whole.T.contiguous()}
    return {(HEAD, None): whole}
