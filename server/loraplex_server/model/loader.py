"""From a model source to a transformer: the spec, then the weights, shard by shard."""

from __future__ import annotations

import torch

from loraplex_server.model.checkpoint import open_checkpoint
from loraplex_server.model.linear import Quantization
from loraplex_server.model.model_shard import ModelShard
from loraplex_server.model.source import ModelSource
from loraplex_server.model.spec import ModelSpec
from loraplex_server.model.transformer import Transformer
from loraplex_server.model.weights import ModelWeights, fill_weights


def load_spec(source: ModelSource) -> ModelSpec:
    """Derive the spec from the source's config and generation config.

    Raises:
        UnsupportedModel: the model is not one that is computed here.
        CheckpointError: the config cannot be read.
    """
    return ModelSpec.from_config(
        source.load_config(), base_name=source.name, eos_token_ids=source.generation_eos_ids()
    )


def load_weights(
    source: ModelSource,
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantization: Quantization = "none",
    shard: ModelShard | None = None,
) -> ModelWeights:
    """Load the source's tensors at `dtype` (float32 or bfloat16), one at a time.

    See `fill_weights` for `quantization`.

    Args:
        shard: the part of the model that is wanted; default: all.

    Raises:
        CheckpointError: files are damaged, or their tensors do not fit the spec.
    """
    checkpoint = open_checkpoint(source, spec)
    tensors = ((name, checkpoint.read(name)) for name in checkpoint.names())
    if shard is not None:
        tensors = ((name, shard.own(name, tensor, spec)) for name, tensor in tensors)
    return fill_weights(
        spec if shard is None else shard.spec(spec),
        tensors,
        dtype=dtype,
        device=device,
        quantization=quantization,
        path=str(source.path),
    )


def load_model(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    max_model_len: int | None = None,
) -> Transformer:
    """Load spec and weights and put them together; raises what those two raise."""
    spec = load_spec(source)
    weights = load_weights(source, spec, dtype=dtype, device=device)
    return Transformer(spec, weights, max_model_len=max_model_len)
