"""What the model computes, derived once from a transformers config.

Every family and option is either applied by `transformer.py` or refused here by name: nothing of a
config is accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from loraplex_memory.layout import ModelGeometry
from loraplex_server.model.errors import UnsupportedModel
from loraplex_server.model.rope import RopeSpec, rope_spec

_OFF: Final = (None, False)

#: Options of other architectures, and the values with which they change nothing.
_NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "compression_config": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "logit_scale": (None, 1.0),
    "scale_emb": (None, 1.0),
    "scale_depth": (None, 1.0),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "moe_intermediate_size": (None, 0),
    "kv_lora_rank": (None, 0),
    "no_rope_layers": (None,),
    "clip_qkv": (None,),
    "use_bidirectional_attention": _OFF,
    "is_encoder_decoder": _OFF,
    "add_cross_attention": _OFF,
    "rope_interleave": _OFF,
    "rope_interleaved": _OFF,
    "text_config": (None,),
    "vision_config": (None,),
    "audio_config": (None,),
}


@dataclass(frozen=True)
class ModelSpec:
    """Immutable; all that loading, memory and the forward pass need to know.

    Attributes:
        architecture: transformers' class name, e.g. `LlamaForCausalLM`.
        base_name: what the model is called towards users.
        sliding_windows: per layer, tokens that a query sees (itself included), or None for all.
        o_bias: the output projection of attention has a bias.
        mlp_bias: gate, up and down have biases.
        qk_norm: RMSNorm over each head of q and k, before the rotation (Qwen3).
        is_fused: the checkpoint stores `qkv_proj` and `gate_up_proj` (Phi-3).
        eos_token_ids: each of them ends a sequence.
    """

    architecture: str
    base_name: str
    geometry: ModelGeometry
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeSpec
    sliding_windows: tuple[int | None, ...]
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    is_fused: bool
    eos_token_ids: frozenset[int]

    @classmethod
    def from_config(
        cls, config: Any, *, base_name: str, eos_token_ids: Iterable[int] = ()
    ) -> ModelSpec:
        """Derive the spec of a transformers config.

        Args:
            config: a `PreTrainedConfig`.
            base_name: see the attribute.
            eos_token_ids: further end tokens, from the generation config.

        Raises:
            UnsupportedModel: an architecture or option that is not implemented.
        """
        architecture = _architecture(config)
        family = _FAMILIES[architecture]
        _check_options(config, family)
        return cls(
            architecture=architecture,
            base_name=base_name,
            geometry=_geometry(config),
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope=rope_spec(config),
            sliding_windows=family.windows(config),
            tie_word_embeddings=bool(config.tie_word_embeddings),
            qkv_bias=family.flag(config, family.qkv_bias),
            o_bias=family.flag(config, family.o_bias),
            mlp_bias=family.flag(config, family.mlp_bias),
            qk_norm=family.qk_norm,
            is_fused=family.is_fused,
            eos_token_ids=token_id_set(config.eos_token_id) | frozenset(eos_token_ids),
        )


def token_id_set(value: int | Iterable[int] | None) -> frozenset[int]:
    """Return the ids of a config's `eos_token_id`: one, several or none."""
    if value is None:
        return frozenset()
    return frozenset({value} if isinstance(value, int) else value)


def _architecture(config: Any) -> str:
    """Return the architecture; a GGUF file names only the model type."""
    by_type = {family.model_type: name for name, family in _FAMILIES.items()}
    architecture = (config.architectures or [by_type.get(config.model_type)])[0]
    if architecture not in _FAMILIES:
        raise UnsupportedModel(
            field="architectures" if config.architectures else "model_type",
            value=architecture or config.model_type,
            reason=f"supported are {', '.join(_FAMILIES)}",
        )
    expected = _FAMILIES[architecture].model_type
    if config.model_type != expected:
        raise UnsupportedModel(
            field="model_type", value=config.model_type, reason=f"{architecture} is {expected!r}"
        )
    return str(architecture)


def _check_options(config: Any, family: _Family) -> None:
    for name, allowed in {**_NEUTRAL, **family.neutral}.items():
        value = getattr(config, name, None if name != "hidden_act" else "silu")
        if value not in allowed:
            raise UnsupportedModel(
                field=name, value=value, reason=f"not implemented for {family.model_type}"
            )
    partial = (config.rope_parameters or {}).get("partial_rotary_factor")
    if partial not in (None, 1.0) and not family.partial_rotary:
        raise UnsupportedModel(
            field="rope_parameters.partial_rotary_factor",
            value=partial,
            reason=f"{family.model_type} rotates whole heads",
        )


def _geometry(config: Any) -> ModelGeometry:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise UnsupportedModel(
            field="num_key_value_heads", value=kv_heads, reason=f"does not divide {heads} heads"
        )
    return ModelGeometry(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate_size=config.intermediate_size,
    )


def _no_windows(config: Any) -> tuple[int | None, ...]:
    return (None,) * int(config.num_hidden_layers)


def _same_window(config: Any) -> tuple[int | None, ...]:
    return (config.sliding_window,) * int(config.num_hidden_layers)


def _windows_by_type(config: Any) -> tuple[int | None, ...]:
    """Return the windows of Qwen: transformers fills in `layer_types` where a config has none."""
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    types = config.layer_types
    if len(types) != config.num_hidden_layers or not windows.keys() >= set(types):
        raise UnsupportedModel(
            field="layer_types", value=types, reason=f"one of {', '.join(windows)} for each layer"
        )
    if "sliding_attention" in types and config.sliding_window is None:
        raise UnsupportedModel(
            field="sliding_window", value=None, reason="layer_types has sliding_attention"
        )
    return tuple(windows[layer_type] for layer_type in types)


@dataclass(frozen=True)
class _Family:
    """What one architecture computes. A bias flag may be the name of the config field."""

    model_type: str
    windows: Callable[[Any], tuple[int | None, ...]]
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    is_fused: bool = False
    partial_rotary: bool = False
    neutral: Mapping[str, tuple[object, ...]] = field(default_factory=dict)

    @staticmethod
    def flag(config: Any, flag: bool | str) -> bool:
        return bool(getattr(config, flag)) if isinstance(flag, str) else flag


_NO_BIAS: Final = {"attention_bias": _OFF, "mlp_bias": _OFF}

_FAMILIES: Final[dict[str, _Family]] = {
    "LlamaForCausalLM": _Family(
        "llama",
        _no_windows,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        neutral={"sliding_window": (None,), "layer_types": (None,)},
    ),
    "MistralForCausalLM": _Family(
        "mistral", _same_window, neutral={**_NO_BIAS, "layer_types": (None,)}
    ),
    "Qwen2ForCausalLM": _Family(
        "qwen2", _windows_by_type, qkv_bias=True, neutral={"mlp_bias": _OFF}
    ),
    "Qwen3ForCausalLM": _Family(
        "qwen3",
        _windows_by_type,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        neutral={"mlp_bias": _OFF},
    ),
    "Phi3ForCausalLM": _Family(
        "phi3",
        _same_window,
        is_fused=True,
        partial_rotary=True,
        neutral={**_NO_BIAS, "layer_types": (None,)},
    ),
}
