"""PEFT folders with random weights of a given strength, from a seed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from loraplex_memory.layout import ModelGeometry, Projection

TARGETS: tuple[Projection, ...] = ("q", "k", "v", "o")


def write_adapter(
    folder: Path, geometry: ModelGeometry, *, rank: int, seed: int, base_name: str
) -> None:
    """Write one adapter on q, k, v and o with alpha = 2 * rank.

    B is not zero: each update is about a tenth of a typical weight, so that answers differ from
    the base's without turning to noise.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(geometry.num_layers):
        for target in TARGETS:
            d_in, d_out = geometry.in_features(target), geometry.out_features(target)
            key = f"base_model.model.model.layers.{layer}.self_attn.{target}_proj"
            a = torch.randn(rank, d_in, generator=generator) / math.sqrt(d_in)
            b = torch.randn(d_out, rank, generator=generator) * 0.005 / math.sqrt(rank)
            tensors[f"{key}.lora_A.weight"] = a.bfloat16()
            tensors[f"{key}.lora_B.weight"] = b.bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [f"{target}_proj" for target in TARGETS],
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
