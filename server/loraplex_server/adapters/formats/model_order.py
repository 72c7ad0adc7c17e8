"""All linears of the base in the order of its modules: some adapters number what they adapt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.formats.linears import Linear, parse_linear

_SPLIT: Final = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
#: As transformers' Phi-3 defines them.
_FUSED: Final = ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")


def linears_in_order(base: BaseModel) -> Iterator[Linear]:
    """Yield the linears of all layers as `named_modules` of the transformers model does."""
    for layer in range(base.geometry.num_layers):
        for name in _FUSED if base.spec.is_fused else _SPLIT:
            linear = parse_linear(f"model.layers.{layer}.{name}")
            assert linear is not None, name
            yield linear
