"""Adapters that are folded into LoRA pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch

from loraplex_memory.adapter_spec import INPUT_NORM
from tests.support.peft_cases import (
    LINEARS,
    biased_base,
    fields,
)
from tests.support.peft_other_case import OtherCase, case, drop_part, fused_base, tensors

ATTENTION = LINEARS[:4]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def prune_adalora(model: Any) -> None:
    """Prune every linear to half its ranks, and one to none, as training does."""
    pattern = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_E"):
            rank = module.lora_E["default"].shape[0]
            is_empty = name.endswith("layers.1.self_attn.k_proj")
            pattern[f"{name}.lora_E"] = [not is_empty and i % 2 == 0 for i in range(rank)]
    model.peft_config["default"].rank_pattern = pattern


FOLDED_CASES: Mapping[str, Callable[[str], OtherCase]] = {
    "adalora": case(
        lambda: peft.AdaLoraConfig(init_r=8, lora_alpha=32, total_step=10, target_modules=LINEARS),
        fields(init_r=100),
        strength={"": 0.3, "lora_E": 0.7},
    ),
    "adalora pruned": case(
        lambda: peft.AdaLoraConfig(init_r=8, lora_alpha=32, total_step=10, target_modules=LINEARS),
        fields(init_r=4),
        strength={"": 0.4, "lora_E": 1.0},
        prepare=prune_adalora,
    ),
    "vera": case(
        lambda: peft.VeraConfig(r=16, projection_prng_key=3, target_modules=LINEARS),
        tensors("vera_lambda_d", torch.ones_like),
        strength={"": 1.0},
    ),
    "vera drawn": case(
        lambda: peft.VeraConfig(
            r=16, projection_prng_key=3, save_projection=False, target_modules=LINEARS
        ),
        fields(projection_prng_key=0),
        strength={"": 1.0},
    ),
    "vera fused": case(
        lambda: peft.VeraConfig(
            r=16, projection_prng_key=3, save_projection=False, target_modules=FUSED
        ),
        fields(projection_prng_key=0),
        base=fused_base,
        strength={"": 1.0},
    ),
    "vera with biases": case(
        lambda: peft.VeraConfig(r=8, bias="vera_only", target_modules=LINEARS),
        misread=drop_part("bias.down"),
        base=biased_base,
        strength={"": 0.5, "bias": 1.0},
    ),
    "pvera": case(
        lambda: peft.PveraConfig(r=16, target_modules=LINEARS),
        tensors("pvera_lambda_d", lambda d: d.roll(len(d) // 2)),
        strength={"": 1.0},
    ),
    "pvera drawn": case(
        lambda: peft.PveraConfig(
            r=16, projection_prng_key=8, save_projection=False, target_modules=LINEARS
        ),
        fields(projection_prng_key=0),
        strength={"": 1.0},
    ),
    "vblora": case(
        lambda: peft.VBLoRAConfig(
            r=4, num_vectors=40, vector_length=16, topk=3, target_modules=LINEARS
        ),
        fields(topk=1),
        strength={"": 1.0, "bank": 0.5},
    ),
    "vblora chosen": case(
        lambda: peft.VBLoRAConfig(
            r=4,
            num_vectors=40,
            vector_length=16,
            topk=2,
            save_only_topk_weights=True,
            target_modules=LINEARS,
        ),
        # The last weight, which the file leaves out, taken for 0.
        tensors("topk_weights", torch.ones_like),
        strength={"": 1.0, "bank": 0.5},
    ),
    "unilora": case(
        lambda: peft.UniLoraConfig(r=4, theta_d_length=64, proj_seed=5, target_modules=LINEARS),
        fields(proj_seed=42),
        strength={"": 4.0},
    ),
    "unilora saved": case(
        lambda: peft.UniLoraConfig(
            r=4, theta_d_length=64, proj_seed=5, save_indices=True, target_modules=LINEARS
        ),
        tensors("unilora_scales", lambda scales: scales * 3),
        strength={"": 4.0},
    ),
    "unilora fused": case(
        lambda: peft.UniLoraConfig(r=4, theta_d_length=64, proj_seed=5, target_modules=FUSED),
        fields(proj_seed=42),
        base=fused_base,
        strength={"": 4.0},
    ),
    "tinylora": case(
        lambda: peft.TinyLoraConfig(r=4, u=8, projection_seed=3, target_modules=LINEARS),
        tensors("tinylora_P", torch.zeros_like),
        strength={"": 0.5},
    ),
    "tinylora tied and drawn": case(
        lambda: peft.TinyLoraConfig(
            r=4,
            u=8,
            projection_seed=3,
            weight_tying=0.6,
            save_projection=False,
            target_modules=LINEARS,
        ),
        fields(projection_seed=42),
        strength={"": 0.5},
    ),
    "loha": case(
        lambda: peft.LoHaConfig(r=4, alpha=12, target_modules=LINEARS),
        fields(alpha=4),
        strength={"": 0.3},
    ),
    "loha patterns": case(
        lambda: peft.LoHaConfig(
            r=4,
            alpha=8,
            rank_pattern={"q_proj": 2, "layers.1.mlp.*": 3},
            alpha_pattern={"o_proj": 24},
            target_modules=LINEARS,
        ),
        fields(alpha_pattern={}),
        strength={"": 0.5},
    ),
    "lokr": case(
        lambda: peft.LoKrConfig(r=8, alpha=8, target_modules=LINEARS),
        fields(alpha=1),
    ),
    "lokr factored": case(
        lambda: peft.LoKrConfig(
            r=1, alpha=8, decompose_both=True, decompose_factor=4, target_modules=LINEARS
        ),
        fields(alpha=1),
        strength={"": 0.5},
    ),
    "miss": case(
        lambda: peft.MissConfig(r=8, target_modules=LINEARS),
        tensors("miss_block", lambda block: block.roll(1, 0)),
    ),
    "miss beside norms": case(
        lambda: peft.MissConfig(r=8, target_modules=LINEARS, modules_to_save=["input_layernorm"]),
        misread=drop_part(INPUT_NORM),
        strength={"": 0.1, "layernorm": 1.0},
    ),
    "miss uneven": case(
        lambda: peft.MissConfig(r=6, target_modules=LINEARS),
        tensors("miss_block", lambda block: block.roll(1, 0)),
    ),
    "miss mini": case(
        lambda: peft.MissConfig(r=8, mini_r=8, init_weights="mini", target_modules=LINEARS),
        tensors("miss_block", lambda block: block.roll(1, 1)),
    ),
    "hra": case(lambda: peft.HRAConfig(r=4, target_modules=LINEARS), fields(apply_GS=True)),
    "hra orthogonal": case(
        lambda: peft.HRAConfig(r=4, apply_GS=True, target_modules=LINEARS),
        fields(apply_GS=False),
    ),
    "hra biased": case(
        lambda: peft.HRAConfig(r=4, target_modules=ATTENTION),
        fields(apply_GS=True),
        base=biased_base,
    ),
    "delora": case(
        lambda: peft.DeloraConfig(
            r=4, rank_pattern={"q_proj": 2}, lambda_pattern={"o_proj": 3}, target_modules=LINEARS
        ),
        tensors("delora_w_norm", torch.ones_like),
        strength={"": 0.5, "lambda": 12.0},
    ),
    "gralora": case(
        lambda: peft.GraloraConfig(r=8, gralora_k=4, alpha=16, target_modules=LINEARS),
        fields(alpha=8),
    ),
    "gralora hybrid": case(
        lambda: peft.GraloraConfig(r=4, gralora_k=2, alpha=12, hybrid_r=3, target_modules=LINEARS),
        tensors("general", torch.zeros_like),
        strength={"": 0.4},
    ),
    "deft": case(
        lambda: peft.DeftConfig(r=4, target_modules=LINEARS),
        fields(decomposition_method="qr"),
    ),
    "deft qr scaled": case(
        lambda: peft.DeftConfig(r=4, alpha=12, decomposition_method="qr", target_modules=LINEARS),
        fields(alpha=None),
    ),
    "deft biased": case(
        lambda: peft.DeftConfig(r=4, target_modules=LINEARS),
        fields(decomposition_method="qr"),
        base=biased_base,
    ),
    "deft para": case(
        lambda: peft.DeftConfig(r=4, para=True, decomposition_method="qr", target_modules=LINEARS),
        fields(decomposition_method="relu"),
    ),
    "poly": case(
        lambda: peft.PolyConfig(r=4, n_tasks=3, n_skills=4, n_splits=2, target_modules=LINEARS),
        fields(loraplex_task=0),
        strength={"": 0.6, "module_logits": 4.0},
        task_id=2,
    ),
}
