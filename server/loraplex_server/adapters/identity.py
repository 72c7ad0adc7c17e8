"""The identity of an adapter: a digest of exactly what it computes, and of nothing else.

SHA-256 over, in this order:

    b"loraplex-adapter-2\\n"
    for every (layer, projection), layers ascending, projections in alphabetical order:
        f"{layer}.{projection} {dtype of A} {r}x{in} {dtype of B} {out}x{r} {scale}\\n" in ASCII
        the bytes of A, row-major, little-endian
        the bytes of B, likewise
    for every part, by name, then layer:
        f"{layer}.{name} {dtype} {rows}x{elements}\\n", without `{layer}.` for one of the model
        its bytes
    for every list of token ids that is not empty, `token_ids`, `head_token_ids` and
    `invocation_token_ids`:
        f"{list} {comma-separated ids}\\n"

`dtype` is torch's name (`bfloat16`); `scale` is `float.hex()` of alpha / r (or alpha / sqrt(r)).
So neither the order of tensors in the uploaded file, nor fields that change nothing (dropout, the
PEFT version, the base's recorded name), nor how the same ranks and alphas were written down
change the id; another scale, dtype or bit of a weight does.
"""

from __future__ import annotations

import hashlib

import torch

from loraplex_memory.adapter_file import FORMAT, ID_LISTS, part_name
from loraplex_memory.adapter_weights import AdapterWeights

ID_PREFIX = "sha256:"


def adapter_id(weights: AdapterWeights) -> str:
    """Return `sha256:<64 hex digits>`; reads every tensor once."""
    digest = hashlib.sha256(f"{FORMAT}\n".encode())
    for (layer, projection), pair in sorted(weights.lora.items(), key=lambda item: item[0]):
        line = f"{layer}.{projection} {_kind(pair.a)} {_kind(pair.b)} {pair.scale.hex()}\n"
        digest.update(line.encode())
        digest.update(_bytes(pair.a))
        digest.update(_bytes(pair.b))
    for key in sorted(weights.parts, key=lambda key: (key[0], key[1] or 0)):
        tensor = weights.parts[key]
        digest.update(f"{part_name(key)} {_kind(tensor)}\n".encode())
        digest.update(_bytes(tensor))
    for name in ID_LISTS:
        if ids := getattr(weights, name):
            digest.update(f"{name} {','.join(map(str, ids))}\n".encode())
    return ID_PREFIX + digest.hexdigest()


def _kind(tensor: torch.Tensor) -> str:
    rows, columns = tensor.shape
    return f"{str(tensor.dtype).removeprefix('torch.')} {rows}x{columns}"


def _bytes(tensor: torch.Tensor) -> memoryview:
    # Memory as it lies: torch's supported platforms are little-endian.
    return tensor.contiguous().view(torch.uint8).numpy().data
