"""Reading a GGUF file: its config through transformers, its tensors dequantised one at a time.

transformers would load the tensors too, but it builds a whole model around them (five times the
start-up time of this) and skips tensors and metadata that it does not know. Here each of them is
applied or refused. The tensors are those transformers gives (a test compares).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from loraplex_server.model.errors import CheckpointError, UnsupportedModel
from loraplex_server.model.spec import ModelSpec
from loraplex_server.model.weights import EMBEDDING, FINAL_NORM, LM_HEAD

_NAMES: Final = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": FINAL_NORM,
    "output.weight": LM_HEAD,
}
_LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

#: Metadata of an architecture that transformers turns into its config.
_APPLIED: Final = frozenset(
    {
        "context_length",
        "block_count",
        "feed_forward_length",
        "embedding_length",
        "rope.freq_base",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.layer_norm_rms_epsilon",
        "vocab_size",
    }
)


def read_gguf_config(path: Path) -> Any:
    """Return the transformers config of a GGUF file, its metadata checked key by key.

    Raises:
        UnsupportedModel: an architecture, or metadata that changes the computation and is not
            carried over into the config.
        CheckpointError: not a readable GGUF file.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        if "not supported" in str(error):
            raise UnsupportedModel(
                field="general.architecture", value=path.name, reason=str(error)
            ) from error
        raise CheckpointError(path=str(path), reason=f"not a GGUF model: {error}") from error
    metadata = _architecture_metadata(path)
    # The window is the one option that transformers leaves at its class default.
    if hasattr(config, "sliding_window"):
        config.sliding_window = metadata.pop("attention.sliding_window", None) or None
    _check_metadata(metadata, config)
    return config


def _architecture_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata under the architecture's prefix, without the prefix."""
    fields = _reader(path).fields
    prefix = fields["general.architecture"].contents() + "."
    return {
        name.removeprefix(prefix): entry.contents()
        for name, entry in fields.items()
        if name.startswith(prefix)
    }


def _check_metadata(metadata: dict[str, Any], config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    neutral = {
        "rope.dimension_count": (head_dim,),
        "attention.key_length": (head_dim,),
        "attention.value_length": (head_dim,),
        "rope.scaling.type": ("none",),
        "rope.scaling.original_context_length": (config.max_position_embeddings,),
        "expert_count": (0,),
        "expert_used_count": (0,),
    }
    for name in sorted(metadata.keys() - _APPLIED):
        if metadata[name] not in neutral.get(name, ()):
            raise UnsupportedModel(
                field=name, value=metadata[name], reason="GGUF metadata that is not implemented"
            )


def read_gguf_tensors(path: Path, spec: ModelSpec) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor as float32 under its checkpoint name; unknown names pass unchanged."""
    from gguf import dequantize

    reader = _reader(path)
    # llama.cpp stores q and k of this architecture with rotation pairs side by side.
    is_interleaved = reader.fields["general.architecture"].contents() == "llama"
    for tensor in reader.tensors:
        name = _checkpoint_name(tensor.name, spec)
        value = dequantize(tensor.data, tensor.tensor_type)
        if is_interleaved and ".q_proj." in name:
            value = _to_half_rotation(value, spec.geometry.num_heads)
        elif is_interleaved and ".k_proj." in name:
            value = _to_half_rotation(value, spec.geometry.num_kv_heads)
        yield name, torch.tensor(value, dtype=torch.float32)


def _checkpoint_name(name: str, spec: ModelSpec) -> str:
    if name in _NAMES:
        return _NAMES[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _LAYER_NAMES:
        return name
    module = _LAYER_NAMES[parts[2]]
    if spec.is_fused and module == "mlp.up_proj":
        module = "mlp.gate_up_proj"
    return f"model.layers.{parts[1]}.{module}.{parts[3]}"


def _to_half_rotation(rows: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Undo llama.cpp's row permutation `(heads, 2, D/2) -> (heads, D/2, 2)`."""
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _reader(path: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(str(path))
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(path=str(path), reason=f"not a GGUF file: {error}") from error
