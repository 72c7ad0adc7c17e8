"""Rotary position embedding: frequencies from transformers, cos and sin tables.

The formulas of every scaling kind are transformers' own (`ROPE_INIT_FUNCTIONS`), so that a base
model means here what it means there. The layout is Hugging Face's half rotation: element `i` pairs
with `i + rot_dim / 2`.

A token's rotation depends on its position only, never on the length of some sequence in the step:
"same answer in any company" (DESIGN.md). Two kinds break that in transformers:

- `dynamic` NTK rescales all frequencies by the current length. Refused.
- `longrope` (Phi-3) has short and long frequencies, and transformers takes the long ones as soon as
  one position of the forward pass is beyond `original_max_position_embeddings`, which leaves keys
  of both kinds in one cache. Here the engine's `max_model_len` decides once, at start-up: up to
  the original length the short ones, beyond it the long ones for every sequence.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Final

import torch

from loraplex_kernels.model_tables import RopeTable
from loraplex_server.model.errors import UnsupportedModel

_COMMON: Final = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_SCALED: Final = frozenset({"factor", "original_max_position_embeddings"})

#: Rope types that are applied, with every parameter that each may have.
_PARAMETERS: Final[dict[str, frozenset[str]]] = {
    "default": _COMMON,
    "linear": _COMMON | {"factor"},
    "llama3": _COMMON | _SCALED | {"low_freq_factor", "high_freq_factor"},
    "yarn": _COMMON
    | _SCALED
    | {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": _COMMON | _SCALED | {"attention_factor", "short_factor", "long_factor"},
}


@dataclass(frozen=True)
class RopeSpec:
    """Frequencies of one model; float32 values, `rot_dim / 2` of them.

    Attributes:
        rope_type: the transformers name of the scaling kind.
        inv_freq: frequencies; those of the short regime for `longrope`.
        attention_factor: factor on cos and sin.
        long_inv_freq: frequencies of the long regime, for `longrope` only.
        original_max_positions: longest sequence of the short regime, for `longrope` only.
    """

    rope_type: str
    inv_freq: tuple[float, ...]
    attention_factor: float
    long_inv_freq: tuple[float, ...] | None = None
    original_max_positions: int | None = None

    @property
    def rot_dim(self) -> int:
        """Elements of a head that are rotated; the others pass through."""
        return 2 * len(self.inv_freq)

    def frequencies(self, max_model_len: int) -> tuple[float, ...]:
        """Return the frequencies of an engine whose longest sequence is `max_model_len`."""
        if self.long_inv_freq is None or self.original_max_positions is None:
            return self.inv_freq
        is_long = max_model_len > self.original_max_positions
        return self.long_inv_freq if is_long else self.inv_freq


def rope_spec(config: Any) -> RopeSpec:
    """Derive the frequencies from a transformers config.

    Raises:
        UnsupportedModel: an unknown rope type or parameter, or dynamic NTK.
    """
    # Imported here: the engine, which is told the spec, does without that library.
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = dict(config.rope_parameters or {})
    rope_type = _checked_type(parameters)
    if rope_type == "default":
        # Linear scaling by 1 is the unscaled formula (the library keeps that one in each model).
        config = copy.deepcopy(config)
        config.rope_parameters = {**parameters, "rope_type": "linear", "factor": 1.0}
        rope_type_fn = "linear"
    else:
        rope_type_fn = rope_type
    init = ROPE_INIT_FUNCTIONS[rope_type_fn]
    inv_freq, factor = init(config)
    if rope_type != "longrope":
        return RopeSpec(rope_type, tuple(inv_freq.tolist()), float(factor))
    original = int(config.rope_parameters["original_max_position_embeddings"])
    long_inv_freq, _ = init(config, seq_len=original + 1)
    return RopeSpec(
        rope_type,
        tuple(inv_freq.tolist()),
        float(factor),
        long_inv_freq=tuple(long_inv_freq.tolist()),
        original_max_positions=original,
    )


def _checked_type(parameters: dict[str, Any]) -> str:
    """Return the rope type after refusing what would not be applied."""
    rope_type = str(parameters.get("rope_type", "default"))
    if rope_type == "dynamic":
        raise UnsupportedModel(
            field="rope_parameters.rope_type",
            value=rope_type,
            reason="its frequencies change with the sequence's length; use yarn or linear scaling",
        )
    if rope_type not in _PARAMETERS:
        raise UnsupportedModel(
            field="rope_parameters.rope_type",
            value=rope_type,
            reason=f"supported are {', '.join(_PARAMETERS)}",
        )
    for name in sorted(parameters.keys() - _PARAMETERS[rope_type]):
        if parameters[name] is not None:
            raise UnsupportedModel(
                field=f"rope_parameters.{name}",
                value=parameters[name],
                reason=f"not a parameter of {rope_type} rope",
            )
    return rope_type


def build_rope_table(
    spec: RopeSpec, max_model_len: int, *, dtype: torch.dtype, device: torch.device
) -> RopeTable:
    """Compute the table in float32, then round it to `dtype`, as transformers does."""
    inv_freq = torch.tensor(spec.frequencies(max_model_len), dtype=torch.float32)
    angles = torch.arange(max_model_len, dtype=torch.float32)[:, None] * inv_freq
    cos = angles.cos().mul_(spec.attention_factor)
    sin = angles.sin().mul_(spec.attention_factor)
    return RopeTable(
        torch.cat((cos, cos), dim=-1).to(device, dtype),
        torch.cat((-sin, sin), dim=-1).to(device, dtype),
    )
