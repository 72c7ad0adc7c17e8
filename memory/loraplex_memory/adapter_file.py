"""The canonical on-disk form of an adapter, the one form the engine reads.

One safetensors file: for every layer and projection that carries LoRA, `{layer}.{projection}.A`
`[R, in]` and `{layer}.{projection}.B` `[out, R]` in the trainer's dtype, and the scale (alpha / r,
or alpha / sqrt(r)) of each pair as JSON in the header. Nothing here is specific to one trainer's
format; converting to this form is the adapter catalogue's work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file

from loraplex_memory.adapter_layout import AdapterRanks
from loraplex_memory.errors import AdapterFileError
from loraplex_memory.layout import PROJECTIONS, Projection
from loraplex_memory.scratch import Scratch
from loraplex_memory.tensor_file import parse_tensors, read_tensor_file

FORMAT = "loraplex-adapter-1"

_KEY: Final = re.compile(r"(\d+)\.(\w+)", re.ASCII)
_PROJECTIONS: Final[dict[str, Projection]] = {projection: projection for projection in PROJECTIONS}

#: (layer, projection)
ModuleKey = tuple[int, Projection]


@dataclass(frozen=True)
class LoRAPair:
    """One linear's update: `delta(x) = scale * B (A x)` with A `[R, in]` and B `[out, R]`."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


AdapterWeights = Mapping[ModuleKey, LoRAPair]


def ranks_of(weights: AdapterWeights, num_layers: int) -> AdapterRanks:
    """Return the true rank of every module, 0 where there is none."""
    return tuple(
        tuple(weights[layer, p].rank if (layer, p) in weights else 0 for p in PROJECTIONS)
        for layer in range(num_layers)
    )


def write_adapter_file(path: Path, weights: AdapterWeights) -> None:
    """Write `weights` to `path` in the canonical form, modules in a fixed order."""
    tensors: dict[str, torch.Tensor] = {}
    scales: dict[str, float] = {}
    for (layer, projection), pair in sorted(weights.items()):
        key = f"{layer}.{projection}"
        tensors[f"{key}.A"] = pair.a.contiguous()
        tensors[f"{key}.B"] = pair.b.contiguous()
        scales[key] = pair.scale
    save_file(tensors, path, metadata={"format": FORMAT, "scales": json.dumps(scales)})


@dataclass(frozen=True)
class RawAdapterFile:
    """What a canonical file holds: files with one header differ in the values of weights alone.

    Attributes:
        path: for messages.
        header: says where in the data each matrix lies.
        data: uint8, contiguous.
    """

    path: Path
    header: bytes
    data: torch.Tensor

    def weights(self) -> dict[ModuleKey, LoRAPair]:
        """Return the matrices, views of `data`.

        Raises:
            AdapterFileError: the header is of another format, incomplete, or not of this data.
        """
        try:
            tensors, metadata = parse_tensors(self.header, self.data)
            return _pairs(tensors, _read_scales(metadata))
        except ValueError as error:
            raise AdapterFileError(str(self.path), str(error)) from error


def read_raw_adapter(path: Path, scratch: Scratch) -> RawAdapterFile:
    """Read a canonical adapter file into host memory, whatever it says.

    Args:
        path: the file.
        scratch: what to read it into: the weights are gone when it is used again.

    Raises:
        AdapterFileError: the file is missing or truncated, or the disk does not give it.
    """
    try:
        return RawAdapterFile(path, *read_tensor_file(path, scratch))
    except (OSError, ValueError) as error:
        raise AdapterFileError(str(path), str(error)) from error


def read_adapter_file(path: Path) -> dict[ModuleKey, LoRAPair]:
    """Read a canonical adapter file into host memory.

    Raises:
        AdapterFileError: the file is missing, truncated, of another format or incomplete, or the
            disk does not give it.
    """
    return read_raw_adapter(path, Scratch()).weights()


def _pairs(
    tensors: Mapping[str, torch.Tensor], scales: Mapping[str, float]
) -> dict[ModuleKey, LoRAPair]:
    names = {f"{key}.{matrix}" for key in scales for matrix in "AB"}
    if odd := names.symmetric_difference(tensors):
        raise ValueError(f"tensors and scales do not match: {', '.join(sorted(odd)[:8])}")
    return {
        _module_key(key): LoRAPair(tensors[f"{key}.A"], tensors[f"{key}.B"], scale)
        for key, scale in scales.items()
    }


def _read_scales(metadata: Mapping[str, str]) -> dict[str, float]:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"not a {FORMAT} file")
    scales = json.loads(metadata.get("scales", "null"))
    if not isinstance(scales, dict) or not all(isinstance(s, int | float) for s in scales.values()):
        raise ValueError("the scales are missing")
    return scales


def _module_key(key: str) -> ModuleKey:
    match = _KEY.fullmatch(key)
    projection = _PROJECTIONS.get(match[2]) if match else None
    if match is None or projection is None:
        raise ValueError(f"unknown module {key}")
    return int(match[1]), projection
