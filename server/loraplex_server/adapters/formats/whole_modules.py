"""Modules trained in full (`modules_to_save`), and copies of the base's matrices in the file.

PEFT puts whatever the file holds of an embedding or a head in the place of the base's. The copy
that it saves beside a LoRA on them is usually the base's own, and then changes nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Final

import torch

from loraplex_memory.adapter_spec import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    INPUT_NORM,
    K_NORM,
    POST_NORM,
    Q_NORM,
)
from loraplex_memory.adapter_weights import PartKey
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.formats.folder import PeftFolder
from loraplex_server.adapters.formats.linears import PREFIX, parse_linear

FIELD: Final = "modules_to_save"
_MAX_NAMES: Final = 500
_EMBEDDING: Final = "model.embed_tokens"
_HEAD: Final = "lm_head"
_PARTS: Final = {_EMBEDDING: EMBEDDING, _HEAD: HEAD}
_NORMS: Final = {
    "input_layernorm": INPUT_NORM,
    "post_attention_layernorm": POST_NORM,
    "self_attn.q_norm": Q_NORM,
    "self_attn.k_norm": K_NORM,
}
_LAYER: Final = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.(.+)")

Parts = dict[PartKey, torch.Tensor]


def read_whole_modules(folder: PeftFolder, base: BaseModel) -> Parts:
    """Read the fields `modules_to_save` and `ensure_weight_tying` and the modules they name."""
    names = folder.config.names(FIELD)
    if len(names) > _MAX_NAMES:
        # Each is compared with each tensor.
        folder.config.refuse(FIELD, f"at most {_MAX_NAMES} names are read")
        names = ()
    is_tied = folder.config.flag("ensure_weight_tying") and base.tie_word_embeddings
    parts: Parts = {}
    matched: set[str] = set()
    weights = _weights(folder)
    counts = Counter(module for _, module in weights)
    for key, module in weights:
        chosen = _chosen(names, module)
        if counts[module] > 1:
            folder.refuse(key, "given twice: with and without base_layer in its name")
        if module in _PARTS:
            # PEFT saves the head of a tied pair too, though the field names the embedding.
            trained = chosen or (is_tied and _chosen(names, _EMBEDDING))
            parts |= _take_matrix(folder, base, key, module, is_trained=bool(trained))
        elif chosen:
            parts |= _take_module(folder, base, key, module)
        matched |= chosen
    if missing := [name for name in names if name not in matched]:
        folder.config.refuse(FIELD, f"the file holds no weight of {', '.join(missing)[:200]}")
    return parts


def norm_part(base: BaseModel, module: str) -> PartKey | None:
    """Return which part replaces the weight of this norm of the base, if it is one."""
    if module == "model.norm":
        return FINAL_NORM, None
    found = _LAYER.fullmatch(module)
    part = _NORMS.get(found[2]) if found else None
    if found is None or part is None or int(found[1]) >= base.geometry.num_layers:
        return None
    return (part, int(found[1])) if part in (INPUT_NORM, POST_NORM) or base.has_qk_norm else None


def take_norm(folder: PeftFolder, base: BaseModel, key: str, part: PartKey) -> torch.Tensor:
    """Take the tensor `key` as the weight `[1, H]`, or `[1, head_dim]`, of a norm."""
    is_of_head = part[0] in (Q_NORM, K_NORM)
    size = base.geometry.head_dim if is_of_head else base.geometry.hidden_size
    return folder.take(key, (size,))[None]


def _weights(folder: PeftFolder) -> list[tuple[str, str]]:
    """Return the tensors that are called as a weight of the base, and their modules."""
    found = []
    keys = folder.keys()
    for key in keys:
        if key.startswith(PREFIX) and key.endswith(".weight") and ".lora_" not in key:
            module = key.removeprefix(PREFIX).removesuffix(".weight")
            found.append((key, module.removesuffix(".base_layer")))
    return found


def _chosen(names: tuple[str, ...], module: str) -> set[str]:
    """Return the names that PEFT would find the module by: it compares ends, so that "norm" is
    every norm there is."""
    return {name for name in names if name and module.endswith(name)}


def _take_module(folder: PeftFolder, base: BaseModel, key: str, module: str) -> Parts:
    part = norm_part(base, module)
    if part is not None:
        return {part: take_norm(folder, base, key, part)}
    if parse_linear(module) is not None:
        folder.refuse(
            key, "a linear trained in full has no low rank; retrain with LoRA on it instead"
        )
    else:
        folder.refuse(key, "trained in full, but the base has no such norm, embedding or head")
    return {}


def _take_matrix(
    folder: PeftFolder, base: BaseModel, key: str, module: str, *, is_trained: bool
) -> Parts:
    """Take an embedding or a head, unless it is the base's own."""
    shape = (base.vocab_size, base.geometry.hidden_size)
    stored = folder.shape(key)
    if len(stored) == 2 and stored[0] != shape[0]:
        folder.refuse(
            key,
            f"has {stored[0]} rows, the base's vocabulary {shape[0]}; resize the base and serve "
            "that, or train existing tokens as rows (trainable_token_indices)",
        )
        return {}
    tensor = folder.take(key, shape)
    if is_trained:
        return {(_PARTS[module], None): tensor}
    return _overwritten(folder, base, key, module, tensor)


def _overwritten(
    folder: PeftFolder, base: BaseModel, key: str, module: str, tensor: torch.Tensor
) -> Parts:
    """Return what a copy changes that PEFT loads into the base itself, as the file has it.

    It differs where the adapter was trained on another base, and where that base was rounded, or
    the one served is quantised: PEFT computes with the copy then.
    """
    if folder.ledger or torch.equal(base.tensor(f"{module}.weight"), tensor.to(torch.float32)):
        folder.ignore(key, "a copy of the base's")
        return {}
    num_bytes = tensor.numel() * tensor.element_size()
    if num_bytes > folder.limits.max_dense_bytes:
        folder.refuse(
            key,
            f"replaces the base's by another of {num_bytes >> 20} MiB, which is above the limit; "
            "if it is meant to be the base's own, save the adapter without it: "
            "model.save_pretrained(path, save_embedding_layers=False)",
        )
        return {}
    # It is loaded into the one tensor of a tied pair, so that the pair stays tied.
    modules = _PARTS if base.tie_word_embeddings else (module,)
    return {(_PARTS[m], None): tensor if m == module else tensor.clone() for m in modules}
