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
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch

from loraplex_memory.scratch import Scratch

_DTYPES: Final = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

_LENGTH_BYTES: Final = 8

#: Of rows and columns; more than any model has, and no product of two overflows.
_MAX_SIZE: Final = 1 << 31


def read_tensor_file(path: Path, scratch: Scratch) -> tuple[bytes, torch.Tensor]:
    """Return the header of a file, and its data as bytes: a view of `scratch`.

    Raises:
        OSError: the file cannot be opened or read.
        ValueError: it is truncated.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        header_bytes = int.from_bytes(_read(file, _LENGTH_BYTES), "little")
        data_bytes = size - _LENGTH_BYTES - header_bytes
        if data_bytes < 0:
            raise ValueError(f"truncated: {size} bytes, and a header of {header_bytes}")
        header = bytes(_read(file, header_bytes))
        data = scratch.take((data_bytes,), torch.uint8)
        _read_into(file, memoryview(data.numpy()))  # type: ignore[arg-type]
    return header, data


def parse_tensors(
    header_json: bytes, data: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors and the metadata that a header describes; the tensors are views of `data`.

    Raises:
        ValueError: it is no such header, or not of this data.
    """
    header = json.loads(header_json)
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
    """Return every matrix that the header describes; no two calls of torch for one, as this runs
    beside the steps and holds the interpreter."""
    typed = {
        name: data[: data.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        for name, dtype in _DTYPES.items()
    }
    tensors = {}
    for name, entry in header.items():
        try:
            elems = typed[entry["dtype"]]
            (rows, columns), (start, stop) = entry["shape"], entry["data_offsets"]
            size = elems.itemsize
            has_size = 0 <= rows < _MAX_SIZE and 0 <= columns < _MAX_SIZE
            is_placed = 0 <= start <= stop <= data.numel() and start % size == 0
            if not (has_size and is_placed and rows * columns * size == stop - start):
                raise ValueError
            tensors[name] = elems.as_strided((rows, columns), (columns, 1), start // size)
        except (KeyError, TypeError, ValueError) as error:
            size = data.numel()
            raise ValueError(
                f"truncated or corrupt: {name} is no matrix within {size} bytes: {entry}"
            ) from error
    return tensors
