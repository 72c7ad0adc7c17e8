"""The header of a GGUF file: metadata and the table of tensors, read in milliseconds.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
The reader of the `gguf` package decodes every token and merge of the vocabulary on the way, which
takes seconds; here arrays of strings are stepped over.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loraplex_server.model.errors import CheckpointError

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_STRING: Final = 8
_ARRAY: Final = 9
#: struct codes of the scalar value types, by GGUF's number.
_SCALARS: Final = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies. `shape` is in torch's order; `start` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    start: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata by key (arrays of strings as None) and all tensors, in the file's order."""

    metadata: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))

    @property
    def architecture_metadata(self) -> dict[str, Any]:
        """The entries under the architecture's prefix, without it."""
        prefix = f"{self.architecture}."
        return {
            key.removeprefix(prefix): value
            for key, value in self.metadata.items()
            if key.startswith(prefix)
        }


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read metadata and tensor table.

    Raises:
        CheckpointError: the file is missing, truncated or not GGUF.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data).header()
    except (OSError, ValueError, KeyError, struct.error, OverflowError) as error:
        raise CheckpointError(path=str(path), reason=f"not a GGUF file: {error}") from error


class _Cursor:
    """A position in the file; every read moves it on."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def header(self) -> GGUFHeader:
        magic, version = self._bytes(4), self._scalar("I")
        if magic != _MAGIC or version not in _VERSIONS:
            raise ValueError(f"starts with {magic!r}, version {version}")
        num_tensors, num_entries = self._scalar("Q"), self._scalar("Q")
        metadata = {}
        for _ in range(num_entries):
            key = self._string()
            metadata[key] = self._value(self._scalar("I"))
        table = [self._tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        data_start = -(-self._at // alignment) * alignment
        return GGUFHeader(
            metadata,
            tuple(
                GGUFTensor(name, shape, ggml_type, data_start + offset)
                for name, shape, ggml_type, offset in table
            ),
        )

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        sizes = [self._scalar("Q") for _ in range(self._scalar("I"))]
        return name, tuple(reversed(sizes)), self._scalar("I"), self._scalar("Q")

    def _value(self, value_type: int) -> Any:
        if value_type == _STRING:
            return self._string()
        if value_type == _ARRAY:
            return self._array(self._scalar("I"), self._scalar("Q"))
        return self._scalar(_SCALARS[value_type])

    def _array(self, value_type: int, count: int) -> tuple[Any, ...] | None:
        if value_type == _STRING:
            for _ in range(count):
                self._bytes(self._scalar("Q"))
            return None
        if value_type == _ARRAY:
            return tuple(self._value(_ARRAY) for _ in range(count))
        code = f"<{count}{_SCALARS[value_type]}"
        return struct.unpack(code, self._bytes(struct.calcsize(code)))

    def _scalar(self, code: str) -> Any:
        value = struct.unpack_from(f"<{code}", self._data, self._at)[0]
        self._at += struct.calcsize(f"<{code}")
        return value

    def _string(self) -> str:
        return self._bytes(self._scalar("Q")).decode("utf-8")

    def _bytes(self, count: int) -> bytes:
        stop = self._at + count
        if stop > len(self._data):
            raise ValueError("truncated")
        value = self._data[self._at : stop]
        self._at = stop
        return value
