"""The canonical on-disk form of an adapter, the one form the engine reads.

One safetensors file: for every layer and projection that carries LoRA, `{layer}.{projection}.A`
`[R, in]` and `{layer}.{projection}.B` `[out, R]`; for every part, `{layer}.{name}`, or `{name}` of
the whole model; all in the dtype in which they came, or float32 where they were converted. Beside
them, in the header, JSON: the scale of each pair (alpha / r, or what else its format says), and
the token ids that belong to the parts. Nothing here is specific to one trainer's format; converting
to this form is the adapter catalogue's work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from loraplex_memory.adapter_spec import LAYER_PARTS, MODEL_PARTS
from loraplex_memory.adapter_weights import AdapterWeights, LoRAPair, ModuleKey, PartKey
from loraplex_memory.errors import AdapterFileError
from loraplex_memory.layout import PROJECTIONS, Projection
from loraplex_memory.scratch import Scratch
from loraplex_memory.tensor_file import parse_tensors, read_tensor_file

FORMAT = "loraplex-adapter-2"

_MODULE: Final = re.compile(r"(\d+)\.(\w+)", re.ASCII)
_PART: Final = re.compile(r"(\d+)\.(.+)", re.ASCII)
_PROJECTIONS: Final[dict[str, Projection]] = {projection: projection for projection in PROJECTIONS}
#: Fields of `AdapterWeights` that are stored, and part of an adapter's identity, in this order.
ID_LISTS: Final = ("token_ids", "head_token_ids", "invocation_token_ids")


def write_adapter_file(path: Path, weights: AdapterWeights) -> None:
    """Write `weights` to `path` in the canonical form, modules in a fixed order."""
    tensors: dict[str, torch.Tensor] = {}
    scales: dict[str, float] = {}
    for (layer, projection), pair in sorted(weights.lora.items()):
        key = f"{layer}.{projection}"
        tensors[f"{key}.A"] = pair.a.contiguous()
        tensors[f"{key}.B"] = pair.b.contiguous()
        scales[key] = pair.scale
    for part, tensor in weights.parts.items():
        tensors[part_name(part)] = tensor.contiguous()
    facts = {"scales": scales} | {name: getattr(weights, name) for name in ID_LISTS}
    # One entry: several would be written in any order, and alike adapters shall have one header.
    save_file(tensors, path, metadata={FORMAT: json.dumps(facts)})


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

    def weights(self) -> AdapterWeights:
        """Return the matrices, views of `data`.

        Raises:
            AdapterFileError: the header is of another format, incomplete, or not of this data.
        """
        try:
            tensors, metadata = parse_tensors(self.header, self.data)
            facts = _read_facts(metadata)
            lora = _take_pairs(tensors, _read_scales(facts))
            parts = {_part_key(name): tensor for name, tensor in tensors.items()}
            return AdapterWeights(lora, parts, **_read_ids(facts))
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


def read_adapter_file(path: Path) -> AdapterWeights:
    """Read a canonical adapter file into host memory.

    Raises:
        AdapterFileError: the file is missing, truncated, of another format or incomplete, or the
            disk does not give it.
    """
    return read_raw_adapter(path, Scratch()).weights()


def part_name(key: PartKey) -> str:
    """Return `{layer}.{name}`, or `{name}` of the whole model."""
    name, layer = key
    return name if layer is None else f"{layer}.{name}"


def _take_pairs(
    tensors: dict[str, torch.Tensor], scales: Mapping[str, float]
) -> dict[ModuleKey, LoRAPair]:
    """Take the pairs that have a scale out of `tensors`."""
    names = {f"{key}.{matrix}" for key in scales for matrix in "AB"}
    if odd := names.difference(tensors):
        raise ValueError(f"tensors and scales do not match: {', '.join(sorted(odd)[:8])}")
    return {
        _module_key(key): LoRAPair(tensors.pop(f"{key}.A"), tensors.pop(f"{key}.B"), scale)
        for key, scale in scales.items()
    }


def _read_facts(metadata: Mapping[str, str]) -> dict[str, Any]:
    if FORMAT not in metadata:
        raise ValueError(f"not a {FORMAT} file")
    facts = json.loads(metadata[FORMAT])
    if not isinstance(facts, dict):
        raise ValueError("the scales are missing")
    return facts


def _read_scales(facts: Mapping[str, Any]) -> dict[str, float]:
    scales = facts.get("scales")
    if not isinstance(scales, dict) or not all(isinstance(s, int | float) for s in scales.values()):
        raise ValueError("the scales are missing")
    return scales


def _read_ids(facts: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    lists = {name: facts.get(name) for name in ID_LISTS}
    for ids in lists.values():
        if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
            raise ValueError("the token ids are missing")
    return {name: tuple(ids or ()) for name, ids in lists.items()}


def _module_key(key: str) -> ModuleKey:
    match = _MODULE.fullmatch(key)
    projection = _PROJECTIONS.get(match[2]) if match else None
    if match is None or projection is None:
        raise ValueError(f"unknown module {key}")
    return int(match[1]), projection


def _part_key(key: str) -> PartKey:
    if key in MODEL_PARTS:
        return key, None
    match = _PART.fullmatch(key)
    if match is None or match[2] not in LAYER_PARTS:
        raise ValueError(f"tensors and scales do not match: {key}")
    return match[2], int(match[1])
