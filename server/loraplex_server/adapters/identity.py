"""The identity of an adapter: a digest of exactly what it computes, and of nothing else.

SHA-256 over, in this order:

    b"loraplex-adapter-1\\n"
    for every (layer, projection), layers ascending, projections in alphabetical order:
        f"{layer}.{projection} {dtype of A} {r}x{in} {dtype of B} {out}x{r} {scale}\\n" in ASCII
        the bytes of A, row-major, little-endian
        the bytes of B, likewise

`dtype` is torch's name (`bfloat16`); `scale` is `float.hex()` of alpha / r (or alpha / sqrt(r)).
So neither the order of tensors in the uploaded file, nor fields that change nothing (dropout, the
PEFT version, the base's recorded name), nor how the same ranks and alphas were written down
change the id; another scale, dtype or bit of a weight does.
"""

from __future__ import annotations

import hashlib

import torch

from loraplex_memory.adapter_file import FORMAT, AdapterWeights

ID_PREFIX = "sha256:"


def adapter_id(weights: AdapterWeights) -> str:
    """Return `sha256:<64 hex digits>`; reads every tensor once."""
    digest = hashlib.sha256(f"{FORMAT}\n".encode())
    for (layer, projection), pair in sorted(weights.items(), key=lambda item: item[0]):
        line = f"{layer}.{projection} {_kind(pair.a)} {_kind(pair.b)} {pair.scale.hex()}\n"
        digest.update(line.encode())
        digest.update(_bytes(pair.a))
        digest.update(_bytes(pair.b))
    return ID_PREFIX + digest.hexdigest()


def _kind(tensor: torch.Tensor) -> str:
    rows, columns = tensor.shape
    return f"{str(tensor.dtype).removeprefix('torch.')} {rows}x{columns}"


def _bytes(tensor: torch.Tensor) -> memoryview:
    # Memory as it lies: torch's supported platforms are little-endian.
    return tensor.contiguous().view(torch.uint8).numpy().data
