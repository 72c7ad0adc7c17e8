"""Which base model this is, by the content of its files and not by what their folder is called."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Final

_SAFETENSORS: Final = ".safetensors"
#: A config.json whole, and the metadata of a GGUF file with the largest of vocabularies.
_HEAD_BYTES: Final = 16 << 20
_SAMPLE_BYTES: Final = 64 << 10
_NUM_SAMPLES: Final = 16


def base_identity(files: Iterable[Path]) -> str:
    """Return `sha256:<hex>` over what tells one model from another, in milliseconds.

    Of each file, in the order given: its size, its head (the header of a safetensors file, the
    first 16 MiB of any other) and 16 samples of 64 KiB, evenly spread from its first to its last
    byte. Names and folders do not count, so a model may be moved. Two models with the same answer
    differ, if at all, only between the samples.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            size = path.stat().st_size
            digest.update(size.to_bytes(8, "little"))
            digest.update(file.read(_head_bytes(file, path)))
            for start in _sample_starts(size):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return f"sha256:{digest.hexdigest()}"


def _head_bytes(file: IO[bytes], path: Path) -> int:
    """Return how much of the file's head counts; leaves the file at its start."""
    if path.suffix != _SAFETENSORS:
        return _HEAD_BYTES
    length = int.from_bytes(file.read(8), "little")
    file.seek(0)
    return min(8 + length, _HEAD_BYTES)


def _sample_starts(size: int) -> list[int]:
    last = max(0, size - _SAMPLE_BYTES)
    return [last * index // (_NUM_SAMPLES - 1) for index in range(_NUM_SAMPLES)]
