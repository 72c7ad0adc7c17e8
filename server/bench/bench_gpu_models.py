"""Models in real shapes with random weights, and adapters from a seed: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig

from loraplex_memory.adapter_file import write_adapter_file
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.adapter_spec import AdapterRanks, AdapterSpec
from loraplex_memory.adapter_weights import AdapterWeights, LoRAPair
from loraplex_memory.layout import PROJECTIONS, ModelGeometry, Projection
from loraplex_server.model.spec import ModelSpec
from loraplex_server.model.transformer import Transformer
from loraplex_server.model.weights import ModelWeights, allocate, checkpoint_views

#: S-LoRA's targets, and all linears of a layer.
ATTENTION: tuple[Projection, ...] = ("q", "k", "v", "o")
ALL_LINEAR: tuple[Projection, ...] = PROJECTIONS

#: Files per rank that the adapters of a run share: each is read, packed and copied as if it were
#: its own, but thousands of them need no disk.
_FILES_PER_RANK = 4

CONFIGS: dict[str, dict[str, object]] = {
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    # For dry runs only.
    "tiny": {
        "vocab_size": 128,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
    },
}


def model_config(name: str) -> LlamaConfig:
    """Return the transformers config of a shape."""
    return LlamaConfig(architectures=["LlamaForCausalLM"], **CONFIGS[name])


def model_spec(name: str) -> ModelSpec:
    """Return the spec of a shape."""
    return ModelSpec.from_config(model_config(name), base_name=name)


def random_model(
    name: str, device: torch.device, dtype: torch.dtype, *, max_model_len: int
) -> Transformer:
    """Return a model whose weights were drawn on the device."""
    spec = model_spec(name)
    weights = allocate(spec, dtype, device)
    _fill(spec, weights)
    return Transformer(spec, weights, max_model_len=max_model_len)


def _fill(spec: ModelSpec, weights: ModelWeights) -> None:
    generator = torch.Generator(weights.device).manual_seed(0)
    for name, view in checkpoint_views(spec, weights).items():
        if name.endswith("norm.weight"):
            view.fill_(1.0)
        else:
            view.normal_(0, 0.02, generator=generator)
    for linear in weights.linears:
        linear.pack()


def uniform_ranks(
    geometry: ModelGeometry, rank: int, targets: tuple[Projection, ...]
) -> AdapterRanks:
    """Return the ranks of an adapter with one rank on all its targets."""
    row = tuple(rank if p in targets else 0 for p in PROJECTIONS)
    return (row,) * geometry.num_layers


def write_adapters(
    folder: Path, geometry: ModelGeometry, ranks: tuple[int, ...], num_adapters: int, prefix: str
) -> list[AdapterManifest]:
    """Return adapters on q, k, v and o whose ranks take turns, as in S-LoRA's settings."""
    files: dict[tuple[int, int], tuple[Path, AdapterRanks]] = {}
    manifests = []
    for i in range(num_adapters):
        rank = ranks[i % len(ranks)]
        key = rank, i // len(ranks) % _FILES_PER_RANK
        if key not in files:
            files[key] = _write_file(folder, geometry, rank, seed=key[1])
        path, adapter_ranks = files[key]
        manifests.append(AdapterManifest(f"{prefix}-{i}", str(path), AdapterSpec(adapter_ranks)))
    return manifests


def _write_file(
    folder: Path, geometry: ModelGeometry, rank: int, seed: int
) -> tuple[Path, AdapterRanks]:
    path = folder / f"rank-{rank}-{seed}.safetensors"
    ranks = uniform_ranks(geometry, rank, ATTENTION)
    if path.exists():
        return path, ranks
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(geometry.num_layers):
        for target in ATTENTION:
            d_in, d_out = geometry.in_features(target), geometry.out_features(target)
            a = torch.randn(rank, d_in, generator=generator) / d_in**0.5
            b = torch.randn(d_out, rank, generator=generator) * 0.005 / rank**0.5
            weights[layer, target] = LoRAPair(a.bfloat16(), b.bfloat16(), 2.0)
    write_adapter_file(path, AdapterWeights(weights))
    return path, ranks
