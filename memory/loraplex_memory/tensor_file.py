"""Reading a safetensors file of adapter matrices with `read`, in one piece.

Why not the safetensors package: it maps the file, and a mapped file that is cut short, or a disk
that does not answer, kills the process with SIGBUS; a `read` that fails is an error like any other.
It also lets go of the interpreter for as long as the disk takes, and leaves all matrices in one
piece of memory, which `packing` makes use of.

The format: eight bytes, the length N of the header as a little-endian integer; N bytes of JSON,
`{name: {"dtype", "shape", "data_offsets"}}` and `__metadata__`; then the data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch

from loraplex_memory.scratch import Scratch

_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

_LENGTH_BYTES: Final = 8


def read_tensor_file(
    path: Path, scratch: Scratch
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file; the tensors are views of `scratch`.

    Raises:
        OSError: the file cannot be opened or read.
        ValueError: it is truncated, or not such a file.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        header_bytes = int.from_bytes(_read(file, _LENGTH_BYTES), "little")
        data_bytes = size - _LENGTH_BYTES - header_bytes
        if data_bytes < 0:
            raise ValueError(f"truncated: {size} bytes, and a header of {header_bytes}")
        header = json.loads(_read(file, header_bytes))
        data = scratch.take((data_bytes,), torch.uint8)
        _read_into(file, memoryview(data.numpy()))  # type: ignore[arg-type]
    if not isinstance(header, dict):
        raise ValueError("the header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError("the metadata is not an object")
    return _views(header, data), metadata


def _read(file: BinaryIO, num_bytes: int) -> bytearray:
    data = bytearray(num_bytes)
    _read_into(file, memoryview(data))
    return data


def _read_into(file: BinaryIO, view: memoryview) -> None:
    while len(view):
        num_read = file.readinto(view)  # type: ignore[attr-defined]
        if not num_read:
            raise ValueError(f"truncated: {len(view)} bytes are missing")
        view = view[num_read:]


def _views(header: Mapping[str, Any], data: torch.Tensor) -> dict[str, torch.Tensor]:
    typed: dict[str, torch.Tensor] = {}
    tensors = {}
    for name, entry in header.items():
        dtype_name, shape, start, stop = _entry(name, entry)
        dtype = _DTYPES[dtype_name]
        if stop > data.numel():
            raise ValueError(f"truncated: {name} ends at {stop}, the data at {data.numel()}")
        if start % dtype.itemsize or stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name}: {dtype_name} {shape} does not lie at {start} to {stop}")
        if dtype_name not in typed:
            whole = data.numel() // dtype.itemsize * dtype.itemsize
            typed[dtype_name] = data[:whole].view(dtype)
        strides = (shape[1], 1)
        tensors[name] = typed[dtype_name].as_strided(shape, strides, start // dtype.itemsize)
    return tensors


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, int], int, int]:
    """Return dtype, shape, start and stop of a matrix."""
    try:
        dtype, (rows, columns), (start, stop) = (
            entry["dtype"],
            entry["shape"],
            entry["data_offsets"],
        )
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{name}: no matrix is described by {entry}") from error
    if dtype not in _DTYPES:
        raise ValueError(f"{name}: dtype {dtype} is not read")
    numbers = (rows, columns, start, stop)
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(f"{name}: no matrix is described by {entry}")
    return dtype, (rows, columns), start, stop
