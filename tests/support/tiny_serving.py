"""A tiny model with a tokenizer as files, adapters for it, and a server process over them."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.adapters import make_folder
from tests.support.server_process import ServerProcess
from tests.support.tiny_models import save_tiny_model
from tests.support.tiny_tokenizer import make_tokenizer

NAME = "tiny"
_HIDDEN, _LAYERS, _HEADS, _KV_HEADS = 64, 2, 4, 2
_SIZES = {
    "hidden_size": _HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def save_served_model(folder: Path) -> Path:
    """Write model and tokenizer; answers are noise, and end by themselves now and then."""
    tokenizer = make_tokenizer()
    save_tiny_model(folder, vocab_size=len(tokenizer), **_SIZES)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_adapter(folder: Path, *, seed: int, rank: int = 8) -> Path:
    """Write an adapter with LoRA on all projections of attention; each seed makes another one."""
    generator = torch.Generator().manual_seed(seed)
    kv = _HIDDEN * _KV_HEADS // _HEADS
    sizes = {"q_proj": _HIDDEN, "k_proj": kv, "v_proj": kv, "o_proj": _HIDDEN}
    tensors = {}
    for layer in range(_LAYERS):
        for site, num_out in sizes.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{site}"
            a = torch.randn(rank, _HIDDEN, generator=generator)
            b = 0.05 * torch.randn(num_out, rank, generator=generator)
            tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": NAME,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [*sizes],
    }
    return make_folder(folder, config=config, tensors=tensors)


def tiny_flags(model: Path, *, pool_bytes: str = "4MiB") -> tuple[str, ...]:
    """Return flags of a server over the tiny model, with few pages, so that they are fought for."""
    usual = ("--threads", "1", "--host-bytes", "8MiB", "--log-level", "warning")
    sizes = ("--pool-bytes", pool_bytes, "--max-model-len", "1024", "--dtype", "float32")
    return ("--model", str(model), "--served-model-name", NAME, *usual, *sizes)


class TinyServer(ServerProcess):
    """`loraplex serve` over the tiny model."""

    def __init__(self, folder: Path, *flags: str, pool_bytes: str = "4MiB") -> None:
        model = save_served_model(folder / "model")
        super().__init__(folder, *tiny_flags(model, pool_bytes=pool_bytes), *flags)
