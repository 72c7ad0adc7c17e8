"""A model in a GGUF file: its config, and its tensors dequantised one at a time.

transformers could load both, but it builds a whole second model on the way (several times the
start-up time of this), and it skips the tensors and the metadata that it does not know. Here each
of them is applied or refused. Config and tensors are those transformers gives; tests compare.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from loraplex_server.model.errors import CheckpointError, UnsupportedModel
from loraplex_server.model.gguf_header import GGUFHeader, GGUFTensor, read_gguf_header
from loraplex_server.model.spec import ModelSpec
from loraplex_server.model.weights import EMBEDDING, FINAL_NORM, LM_HEAD

_ARCHITECTURES: Final = ("llama", "qwen2", "qwen3", "phi3")

#: Metadata of an architecture that carries over into the field of a transformers config.
_REQUIRED: Final = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OPTIONAL: Final = {"attention.head_count_kv": "num_key_value_heads"}
_DEFAULT_ROPE_THETA: Final = 10000.0

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


def read_gguf_config(path: Path) -> Any:
    """Return a transformers config with what the file says, every key of it checked.

    Raises:
        UnsupportedModel: an architecture that is not computed, or metadata of it that is neither
            carried over into the config nor without effect.
        CheckpointError: not a readable GGUF file.
    """
    from transformers import CONFIG_MAPPING

    header = read_gguf_header(path)
    if header.architecture not in _ARCHITECTURES:
        raise UnsupportedModel(
            field="general.architecture",
            value=header.architecture,
            reason=f"supported in a GGUF file are {', '.join(_ARCHITECTURES)}",
        )
    return CONFIG_MAPPING[header.architecture](**_config_fields(header, path))


def _config_fields(header: GGUFHeader, path: Path) -> dict[str, Any]:
    metadata = header.architecture_metadata
    embedding = next((t for t in header.tensors if t.name == "token_embd.weight"), None)
    absent = [f"{header.architecture}.{key}" for key in _REQUIRED if key not in metadata]
    if embedding is None or absent:
        missing = absent or ["token_embd.weight"]
        raise CheckpointError(path=str(path), reason=f"not a GGUF model: no {', '.join(missing)}")
    names = {**_REQUIRED, **_OPTIONAL}
    fields = {names[key]: metadata.pop(key) for key in names if key in metadata}
    head_dim = metadata.pop("attention.key_length", None)
    head_dim = head_dim or fields["hidden_size"] // fields["num_attention_heads"]
    theta = metadata.pop("rope.freq_base", _DEFAULT_ROPE_THETA)
    fields |= {
        "head_dim": head_dim,
        "vocab_size": embedding.shape[0],
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": all(t.name != "output.weight" for t in header.tensors),
        **_token_ids(header),
    }
    if header.architecture == "phi3":
        fields["sliding_window"] = metadata.pop("attention.sliding_window", None) or None
    _check_left_over(metadata, fields)
    return fields


def _token_ids(header: GGUFHeader) -> dict[str, Any]:
    """Return the special tokens; the end of a turn ends a sequence too, as in llama.cpp."""
    ids = {
        name: header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        for name in ("bos", "padding", "eos", "eot")
    }
    ends = {end for end in (ids["eos"], ids["eot"]) if end is not None}
    return {
        "bos_token_id": ids["bos"],
        "pad_token_id": ids["padding"],
        "eos_token_id": sorted(ends) or None,
    }


def _check_left_over(metadata: dict[str, Any], fields: dict[str, Any]) -> None:
    neutral = {
        "vocab_size": fields["vocab_size"],
        "rope.dimension_count": fields["head_dim"],
        "attention.value_length": fields["head_dim"],
        "rope.scaling.type": "none",
        "rope.scaling.original_context_length": fields["max_position_embeddings"],
        "expert_count": 0,
        "expert_used_count": 0,
    }
    for name, value in sorted(metadata.items()):
        if name not in neutral or value != neutral[name]:
            raise UnsupportedModel(
                field=name, value=value, reason="GGUF metadata that is not implemented"
            )


class GGUFTensors:
    """The tensors of one file by their checkpoint names, each dequantised when it is asked for.

    A name that checkpoints do not have passes unchanged.
    """

    def __init__(self, path: Path, spec: ModelSpec) -> None:
        """Read the header; raises CheckpointError."""
        header = read_gguf_header(path)
        self._path = path
        self._geometry = spec.geometry
        self._tensors = {_checkpoint_name(tensor.name, spec): tensor for tensor in header.tensors}
        if len(self._tensors) != len(header.tensors):
            raise CheckpointError(path=str(path), reason="two tensors of one name")
        self._data = np.memmap(path, mode="r", dtype=np.uint8)
        # llama.cpp stores q and k of this architecture with rotation pairs side by side.
        self._is_interleaved = header.architecture == "llama"

    def names(self) -> tuple[str, ...]:
        """Return all names, in the file's order."""
        return tuple(self._tensors)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor as float32.

        Raises:
            KeyError: there is none of this name.
            CheckpointError: the file is truncated or has a quantisation that `gguf` does not know.
        """
        value = _dequantize(self._data, self._tensors[name], self._path)
        if self._is_interleaved and ".q_proj." in name:
            value = _to_half_rotation(value, self._geometry.num_heads)
        elif self._is_interleaved and ".k_proj." in name:
            value = _to_half_rotation(value, self._geometry.num_kv_heads)
        return torch.tensor(value, dtype=torch.float32)


def _dequantize(
    data: npt.NDArray[np.uint8], tensor: GGUFTensor, path: Path
) -> npt.NDArray[np.float32]:
    """Return one tensor as float32; its last dimension is stored in blocks."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    try:
        kind = GGMLQuantizationType(tensor.ggml_type)
        block_elems, block_bytes = GGML_QUANT_SIZES[kind]
        *rows, width = tensor.shape
        row_bytes = width // block_elems * block_bytes
        stop = tensor.start + int(np.prod(rows, dtype=np.int64)) * row_bytes
        stored = data[tensor.start : stop].reshape(*rows, row_bytes)
        value = dequantize(stored, kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise CheckpointError(
            path=str(path), reason=f"not a GGUF tensor: {error}", tensors=[tensor.name]
        ) from error
    return np.asarray(value, dtype=np.float32).reshape(tensor.shape)


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


def _to_half_rotation(rows: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Undo llama.cpp's row permutation `(heads, 2, D/2) -> (heads, D/2, 2)`."""
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
