"""Adapters of vectors, norms, virtual tokens and rows of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import peft
import torch

from loraplex_memory.adapter_spec import FINAL_NORM, HEAD_ROWS, K_NORM
from loraplex_memory.adapter_spec import bias as bias_part
from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_memory.layout import PROJECTIONS
from tests.support.peft_cases import (
    biased_base,
    fields,
    make_base,
    make_prompts,
    tied_base,
)
from tests.support.peft_other_case import OtherCase, case, drop_part, fused_base, nothing, tensors

#: Some of the prompts hold, in no order.
TOKENS = [make_prompts()[0][at] for at in (2, 5, 11)]


def keep_base_bias(weights: AdapterWeights, reference: Any) -> AdapterWeights:
    """The misreading in which output scales do not scale the base's bias."""
    parts = dict(weights.parts)
    for layer, block in enumerate(reference.model.layers):
        for projection in PROJECTIONS[:3]:
            own = getattr(block.self_attn, f"{projection}_proj").bias
            scale = weights.parts[f"out_scale.{projection}", layer]
            parts[bias_part(projection), layer] = (1 - scale) * own.detach()
    return replace(weights, parts=parts)


def swap_prefix_layout(prefix: torch.Tensor) -> torch.Tensor:
    """Read all keys, then all values, instead of those of one layer after another."""
    n, width = prefix.shape
    return prefix.view(n, 2, 2, width // 4).transpose(1, 2).reshape(n, width)


def qk_norm_base() -> Any:
    return make_base("qwen3", head_dim=16)


def cpt_config() -> peft.PeftConfig:
    ids = [5, 9, 13, 17, 21, 25]
    return peft.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=ids,
        cpt_mask=[1] * len(ids),
        cpt_tokens_type_mask=[1, 2, 3, 4, 1, 2],
        opt_projection_epsilon=40.0,
        opt_projection_format_epsilon=40.0,
    )


PART_CASES: Mapping[str, Callable[[str], OtherCase]] = {
    "ia3": case(
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        tensors("down_proj", torch.ones_like),
        strength={"": 1.0},
    ),
    "ia3 on inputs": case(
        lambda: peft.IA3Config(
            target_modules=["k_proj", "up_proj", "down_proj", "o_proj"],
            feedforward_modules=["o_proj", "down_proj"],
        ),
        tensors("o_proj", torch.ones_like),
        strength={"": 1.0},
    ),
    "ia3 biased": case(
        lambda: peft.IA3Config(
            target_modules=["q_proj", "k_proj", "v_proj"], feedforward_modules=[]
        ),
        misread=keep_base_bias,
        base=biased_base,
        strength={"": 1.5},
    ),
    "ia3 fused": case(
        lambda: peft.IA3Config(
            target_modules=["qkv_proj", "gate_up_proj"], feedforward_modules=["qkv_proj"]
        ),
        tensors("qkv_proj", torch.ones_like),
        base=fused_base,
        strength={"": 1.0},
    ),
    "beft": case(
        lambda: peft.BeftConfig(target_modules=["v_proj", "o_proj", "down_proj"]),
        misread=nothing,
        strength={"": 1.0},
    ),
    "ln tuning": case(
        lambda: peft.LNTuningConfig(
            target_modules=["input_layernorm", "post_attention_layernorm", "norm"]
        ),
        misread=drop_part(FINAL_NORM),
        strength={"": 1.0},
    ),
    "ln tuning of heads": case(
        lambda: peft.LNTuningConfig(target_modules=["q_norm", "k_norm"]),
        misread=drop_part(K_NORM),
        base=qk_norm_base,
        strength={"": 1.5},
    ),
    "trainable tokens": case(
        lambda: peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed_tokens"]),
        fields(token_indices=TOKENS[::-1]),
        strength={"": 1.0},
    ),
    "trainable tokens of the head": case(
        lambda: peft.TrainableTokensConfig(
            token_indices=TOKENS, target_modules=["embed_tokens", "lm_head"]
        ),
        misread=drop_part(HEAD_ROWS),
        strength={"": 1.0},
    ),
    "trainable tokens tied": case(
        lambda: peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed_tokens"]),
        misread=drop_part(HEAD_ROWS),
        base=tied_base,
        strength={"": 1.0},
    ),
    "prompt tuning": case(
        lambda: peft.PromptTuningConfig(num_virtual_tokens=6),
        tensors("prompt_embeddings", lambda prompt: prompt.flip(0)),
        strength={"": 1.0},
    ),
    "p-tuning": case(
        lambda: peft.PromptEncoderConfig(num_virtual_tokens=6, encoder_hidden_size=16),
        misread=nothing,
        strength={"": 0.7},
    ),
    "p-tuning by lstm": case(
        lambda: peft.PromptEncoderConfig(
            num_virtual_tokens=6,
            encoder_hidden_size=16,
            encoder_reparameterization_type="LSTM",
        ),
        misread=nothing,
        strength={"": 0.7},
    ),
    "cpt": case(cpt_config, misread=nothing, strength={"": 0.7}),
    "multitask prompt": case(
        lambda: peft.MultitaskPromptTuningConfig(num_virtual_tokens=6, num_tasks=3, num_ranks=2),
        fields(loraplex_task=0),
        strength={"": 1.0},
        task_id=2,
    ),
    "prefix tuning": case(
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=6),
        tensors("prompt_embeddings", swap_prefix_layout),
        strength={"": 1.0},
    ),
    "prefix tuning projected": case(
        lambda: peft.PrefixTuningConfig(
            num_virtual_tokens=6, prefix_projection=True, encoder_hidden_size=16
        ),
        tensors("prompt_embeddings", swap_prefix_layout),
        strength={"": 0.7},
    ),
    "cartridge": case(
        lambda: peft.CartridgeConfig(num_virtual_tokens=6, num_frozen_tokens=2),
        tensors("prompt_embeddings", swap_prefix_layout),
        strength={"": 1.0},
    ),
}
