"""Adapters of every kind but LoRA: how PEFT makes one, and how it would be misread.

A misreading changes the folder, or what was read of it, as a reader would that ignores the one
field or tensor by which the kind differs from its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import peft
import torch

from loraplex_memory.adapter_spec import FINAL_NORM, HEAD_ROWS, INPUT_NORM, K_NORM
from loraplex_memory.adapter_spec import bias as bias_part
from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_memory.layout import PROJECTIONS
from tests.support.peft_cases import (
    LINEARS,
    Config,
    Naive,
    PeftCase,
    Tensors,
    biased_base,
    edit_folder,
    fields,
    make_base,
    make_prompts,
    quiet,
    tied_base,
)

ATTENTION = LINEARS[:4]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]

#: Some of the prompts hold, in no order.
TOKENS = [make_prompts()[0][at] for at in (2, 5, 11)]

#: What a naive reader would have made of what was read; its second argument is the base.
Misread = Callable[[AdapterWeights, Any], AdapterWeights]


@dataclass(frozen=True)
class OtherCase(PeftCase):
    """A case whose artifact may hold several tasks.

    Attributes:
        config: makes the configuration, without its task type.
        misread: the naive reading where no edit of the folder shows it.
        task_id: what PEFT's forward takes; an uploader says it in the configuration.
    """

    config: Callable[[], peft.PeftConfig] = peft.LoraConfig
    misread: Misread | None = None
    task_id: int | None = None

    def write(self, folder: Path) -> None:
        super().write(folder)
        if self.task_id is not None:
            edit_folder(folder, fields(loraplex_task=self.task_id))

    def peft_logits(self, folder: Path) -> list[torch.Tensor]:
        if self.task_id is None:
            return super().peft_logits(folder)
        with quiet(), torch.no_grad():
            model = peft.PeftModel.from_pretrained(self.base(), folder).eval()
            task_ids = torch.tensor([self.task_id])
            return [
                model(torch.tensor([prompt]), task_ids=task_ids).logits[0, -len(prompt) :]
                for prompt in self.prompts()
            ]


def case(
    config: Callable[[], peft.PeftConfig],
    naive: Naive | None = None,
    *,
    base: Callable[[], Any] = make_base,
    strength: Mapping[str, float] = MappingProxyType({"": 0.15}),
    prepare: Callable[[Any], None] | None = None,
    misread: Misread | None = None,
    task_id: int | None = None,
) -> Callable[[str], OtherCase]:
    """Return a case without its name.

    Args:
        config: makes the configuration, without its task type.
        strength: of the random parameters, by a part of their names; `""` for all others.
        prepare: changes PEFT's model before it is saved.
    """

    def make(model: Any) -> Any:
        chosen = config()
        chosen.task_type = "CAUSAL_LM"
        torch.manual_seed(0)
        tuned = peft.get_peft_model(model, chosen)
        _replace_parameters(tuned, strength)
        if prepare is not None:
            prepare(tuned)
        return tuned

    return lambda name: OtherCase(
        name, make, naive, base, config=config, misread=misread, task_id=task_id
    )


def _replace_parameters(model: Any, strength: Mapping[str, float]) -> None:
    """Replace every trainable parameter, or scale it at random where it is a factor itself."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = next((s for part, s in strength.items() if part and part in name), strength[""])
        noise = own * torch.randn(parameter.shape, generator=generator)
        is_factor = "ia3_l" in name or "ln_tuning" in name
        parameter.data.copy_(1.0 + noise if is_factor else noise)


def tensors(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Naive:
    """Return the change of all tensors with `part` in their names."""

    def apply(_: Config, found: Tensors) -> None:
        names = [name for name in found if part in name]
        assert names
        for name in names:
            found[name] = change(found[name]).contiguous()

    return apply


def drop_part(name: str) -> Misread:
    """Return the misreading without one part."""

    def drop(weights: AdapterWeights, _: Any) -> AdapterWeights:
        parts = {key: part for key, part in weights.parts.items() if key[0] != name}
        assert len(parts) < len(weights.parts)
        lost = {"head_token_ids": ()} if name == HEAD_ROWS else {}
        return replace(weights, parts=parts, **lost)

    return drop


def nothing(_: AdapterWeights, __: Any) -> AdapterWeights:
    """The misreading that answers as the base."""
    return AdapterWeights()


def keep_base_bias(weights: AdapterWeights, reference: Any) -> AdapterWeights:
    """The misreading in which output scales do not scale the base's bias."""
    parts = dict(weights.parts)
    for layer, block in enumerate(reference.model.layers):
        for projection in PROJECTIONS[:3]:
            own = getattr(block.self_attn, f"{projection}_proj").bias
            scale = weights.parts[f"out_scale.{projection}", layer]
            parts[bias_part(projection), layer] = (1 - scale) * own.detach()
    return replace(weights, parts=parts)


def prune_adalora(model: Any) -> None:
    """Prune every linear to half its ranks, and one to none, as training does."""
    pattern = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_E"):
            rank = module.lora_E["default"].shape[0]
            is_empty = name.endswith("layers.1.self_attn.k_proj")
            pattern[f"{name}.lora_E"] = [not is_empty and i % 2 == 0 for i in range(rank)]
    model.peft_config["default"].rank_pattern = pattern


def swap_prefix_layout(prefix: torch.Tensor) -> torch.Tensor:
    """Read all keys, then all values, instead of those of one layer after another."""
    n, width = prefix.shape
    return prefix.view(n, 2, 2, width // 4).transpose(1, 2).reshape(n, width)


def fused_base() -> Any:
    return make_base("phi3")


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


_CASES: Mapping[str, Callable[[str], OtherCase]] = {
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

#: By their names.
CASES: Mapping[str, OtherCase] = {name: make(name) for name, make in _CASES.items()}
