"""Names of tensors in `adapter_model.safetensors`: which linear they belong to, or why none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from loraplex_memory.layout import Projection

#: Linears of one layer and the projections whose rows they hold, in row order. The fused ones are
#: Phi-3's: `qkv_proj` is [q; k; v] and `gate_up_proj` is [gate; up].
LINEARS: Final[Mapping[str, tuple[Projection, ...]]] = {
    "self_attn.q_proj": ("q",),
    "self_attn.k_proj": ("k",),
    "self_attn.v_proj": ("v",),
    "self_attn.o_proj": ("o",),
    "self_attn.qkv_proj": ("q", "k", "v"),
    "mlp.gate_proj": ("gate",),
    "mlp.up_proj": ("up",),
    "mlp.down_proj": ("down",),
    "mlp.gate_up_proj": ("gate", "up"),
}

_LORA_KEY: Final = re.compile(
    r"base_model\.model\.(model\.layers\.(0|[1-9][0-9]{0,5})\.([a-z_]+\.[a-z_]+))"
    r"\.lora_([AB])\.weight"
)

#: Tensors that other PEFT options write; the first that is found in the name explains it.
_EXPLAINED: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    (re.compile(r"\.lora_magnitude_vector"), "DoRA magnitudes are not supported yet"),
    (re.compile(r"\.lora_embedding_[AB]"), "LoRA on embeddings is not supported yet"),
    (re.compile(r"\.lora_B\.(\w+\.)?bias$"), "a bias on lora_B is not supported yet"),
    (re.compile(r"\.lora_E$|\.ranknum$"), "AdaLoRA is not supported yet"),
    (re.compile(r"modules_to_save|\.token_adapter\."), "trained in full, not supported yet"),
    (
        re.compile(r"\.lora_[AB]\.[^.]+\.weight$"),
        "the name holds an adapter's name, as in a raw state_dict; write the folder with "
        "model.save_pretrained()",
    ),
    (
        re.compile(r"^base_model\.model\.layers\."),
        "trained on the bare decoder; load the base with AutoModelForCausalLM and save again",
    ),
    (
        re.compile(r"\.lora_[AB]\.weight$"),
        "not a linear that can carry LoRA here (" + ", ".join(LINEARS) + " of model.layers.N)",
    ),
    (re.compile(r"\.base_layer\.|^base_model\.model\.(lm_head|model)\."), "a weight of the base"),
)


@dataclass(frozen=True)
class LinearKey:
    """One linear of the base; `module` is its name inside the base model, as PEFT matches it."""

    module: str
    layer: int
    projections: tuple[Projection, ...]


def parse_key(key: str) -> tuple[LinearKey, Literal["A", "B"]] | str:
    """Return the linear and the side a tensor belongs to, or why it cannot be applied."""
    found = _LORA_KEY.fullmatch(key)
    projections = LINEARS.get(found[3]) if found else None
    if found and projections:
        side: Literal["A", "B"] = "A" if found[4] == "A" else "B"
        return LinearKey(found[1], int(found[2]), projections), side
    for pattern, reason in _EXPLAINED:
        if pattern.search(key):
            return reason
    return "unknown tensor; it belongs to nothing in a LoRA of this base"
