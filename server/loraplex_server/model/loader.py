"""From a model source to a transformer: the spec, then the weights, shard by shard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from loraplex_server.model.errors import CheckpointError
from loraplex_server.model.gguf_file import read_gguf_tensors
from loraplex_server.model.source import INDEX_FILE, WEIGHTS_FILE, ModelSource
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
) -> ModelWeights:
    """Load the source's tensors at `dtype` (float32 or bfloat16), one at a time.

    Raises:
        CheckpointError: files are damaged, or their tensors do not fit the spec.
    """
    if source.kind == "gguf":
        tensors = read_gguf_tensors(source.path, spec)
    else:
        tensors = _read_safetensors(source.path)
    return fill_weights(spec, tensors, dtype=dtype, device=device, path=str(source.path))


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


def _read_safetensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in _shards(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict, and not iterable
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(path=str(path), reason=str(error)) from error


def _shards(folder: Path) -> list[Path]:
    """Return the weight files in order; an index decides where there is one."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return [folder / WEIGHTS_FILE]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(path=str(index), reason=f"not an index: {error}") from error
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(path=str(index), reason=f"no shard {name!r} in the folder")
    return [folder / name for name in names]
