"""The tensors of a model's files by name, each read when it is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from loraplex_server.model.errors import CheckpointError
from loraplex_server.model.gguf_file import GGUFTensors
from loraplex_server.model.source import INDEX_FILE, WEIGHTS_FILE, ModelSource
from loraplex_server.model.spec import ModelSpec


class Checkpoint(Protocol):
    """Holds no tensor; `read` may be called from any thread."""

    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors, in the order of the files."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in its stored dtype; raises KeyError, CheckpointError."""
        ...


def open_checkpoint(source: ModelSource, spec: ModelSpec) -> Checkpoint:
    """Read the headers of the model's files.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    if source.kind == "gguf":
        return GGUFTensors(source.path, spec)
    return SafetensorsFolder(source.path)


class SafetensorsFolder:
    """One or several safetensors files; an index decides which, where there is one."""

    def __init__(self, folder: Path) -> None:
        """Read the headers; raises CheckpointError."""
        self._paths: dict[str, Path] = {}
        for path in _shards(folder):
            for name in _names(path):
                if self._paths.setdefault(name, path) != path:
                    raise CheckpointError(path=str(path), reason="is in two shards", tensors=[name])

    def names(self) -> tuple[str, ...]:
        return tuple(self._paths)

    def read(self, name: str) -> torch.Tensor:
        path = self._paths[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as error:
            raise CheckpointError(path=str(path), reason=str(error)) from error


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(path=str(path), reason=str(error)) from error


def _shards(folder: Path) -> list[Path]:
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
