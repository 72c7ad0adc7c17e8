"""Tiny random models of every family, with the transformers model as the reference.

That library is imported where it is needed: an engine's process that is given a spec does without.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loraplex_server.model.linear import Linear, Quantization
from loraplex_server.model.spec import ModelSpec
from loraplex_server.model.transformer import Transformer
from loraplex_server.model.weights import (
    ModelWeights,
    checkpoint_views,
    fill_weights,
    random_weights,
)

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
#: For a head of 8 elements, all rotated; twice as long regimes after 64 positions.
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.5, 2.5, 5.0, 9.0],
}


def tiny_config(family: str = "llama", **options: Any) -> Any:
    """Return the transformers config of a tiny model; `options` override its fields."""
    from transformers import CONFIG_MAPPING

    fields = {**SIZES, "architectures": [f"{family.capitalize()}ForCausalLM"], **options}
    return CONFIG_MAPPING[family](**fields)


def tiny_spec(family: str = "llama", **options: Any) -> ModelSpec:
    """Return the spec of `tiny_config(family, **options)`."""
    return ModelSpec.from_config(tiny_config(family, **options), base_name=f"tiny-{family}")


def tiny_reference(config: Any, *, seed: int = 0) -> Any:
    """Return the transformers model of a config, every parameter random, in float32.

    Weights are large enough for logits that differ clearly; biases and norms are random too, as
    transformers would start them at 0 and 1, which hides a forgotten one.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = name.endswith("norm.weight")
            parameter.copy_(1.0 + 0.2 * noise if is_norm else 0.2 * noise)
    return model


def transformer_of(
    reference: Any,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    max_model_len: int | None = None,
) -> Transformer:
    """Return our model with the parameters of a transformers model."""
    spec = ModelSpec.from_config(reference.config, base_name="tiny")
    state = reference.state_dict()
    weights = fill_weights(spec, state.items(), dtype=dtype, device=device)
    return Transformer(spec, weights, max_model_len=max_model_len)


def tiny_transformer(
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantization: Quantization = "none",
    **options: Any,
) -> Transformer:
    """Return our model with random weights, without building a transformers one."""
    spec = tiny_spec(family, **options)
    return random_transformer(
        spec, seed=seed, dtype=dtype, device=device, quantization=quantization
    )


def random_transformer(
    spec: ModelSpec,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantization: Quantization = "none",
) -> Transformer:
    """Return our model of a spec, with random weights."""
    state = random_weights(spec, seed, dtype)
    weights = fill_weights(
        spec, state.items(), dtype=dtype, device=device, quantization=quantization
    )
    return Transformer(spec, weights)


def save_tiny_model(folder: Path, family: str = "llama", *, seed: int = 0, **options: Any) -> Any:
    """Write a tiny model as a Hugging Face folder and return the transformers model."""
    reference = tiny_reference(tiny_config(family, **options), seed=seed)
    reference.save_pretrained(folder)
    return reference


def state_of(spec: ModelSpec, weights: ModelWeights) -> dict[str, torch.Tensor]:
    """Return loaded weights as a checkpoint: names as in files, linears in plain layout."""

    def plain(linear: Linear) -> Linear:
        return Linear(linear.dense_weight(), linear.bias)

    layers = tuple(
        replace(
            layer,
            qkv=plain(layer.qkv),
            o=plain(layer.o),
            gate_up=plain(layer.gate_up),
            down=plain(layer.down),
        )
        for layer in weights.layers
    )
    return checkpoint_views(spec, replace(weights, layers=layers, lm_head=plain(weights.lm_head)))
