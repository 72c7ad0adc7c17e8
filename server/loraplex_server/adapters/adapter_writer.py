"""Writing an adapter's files into the store, and those of format 1 once more."""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open

from loraplex_memory.adapter_file import write_adapter_file
from loraplex_memory.adapter_weights import AdapterWeights, LoRAPair, ModuleKey
from loraplex_memory.layout import PROJECTIONS
from loraplex_server.adapters.archive import WANTED
from loraplex_server.adapters.blobs import BlobStore
from loraplex_server.adapters.data_dir import storage_errors
from loraplex_server.adapters.errors import StorageFailed
from loraplex_server.adapters.identity import adapter_id
from loraplex_server.adapters.registry_migrations import UpgradedBlob

_FORMAT_1 = "loraplex-adapter-1"


class AdapterWriter:
    """Stateless; safe from any thread. Files are made in `staging`."""

    def __init__(self, blobs: BlobStore, staging: Path, at_stage: Callable[[str], None]) -> None:
        self._blobs = blobs
        self._staging = staging
        self._at_stage = at_stage

    def write(self, content_id: str, weights: AdapterWeights) -> int:
        """Put the canonical file under its id and return its size in bytes.

        Written even if it is there: that heals a file that was damaged or lost.
        """
        with storage_errors("store the adapter"), self._folder() as folder:
            file = Path(folder, "adapter.safetensors")
            write_adapter_file(file, weights)
            size_bytes = file.stat().st_size
            self._at_stage("written")
            self._blobs.put(content_id, file)
        self._at_stage("stored")
        return size_bytes

    def write_native(self, content_id: str, uploaded: Path) -> int:
        """Keep the uploaded files, from which the canonical one was computed."""
        with storage_errors("store the adapter"), self._folder() as folder:
            file = Path(folder, "native.tar")
            with tarfile.open(file, "w") as archive:
                for name in WANTED:
                    archive.add(uploaded / name, name)
            size_bytes = file.stat().st_size
            self._blobs.put_native(content_id, file)
        self._at_stage("stored native")
        return size_bytes

    def upgrade(self, old_id: str) -> UpgradedBlob | None:
        """Write a file of format 1 again; see `registry_migrations`.

        Raises:
            StorageFailed: it is damaged.
        """
        with storage_errors("open a file of an earlier release"):
            try:
                weights = _read_format_1(self._blobs.local_path(old_id))
            except FileNotFoundError:
                return None
        new_id = adapter_id(weights)
        return UpgradedBlob(new_id, self.write(new_id, weights))

    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(dir=self._staging, prefix="store-")


def _read_format_1(path: Path) -> AdapterWeights:
    """Read what the first release wrote: LoRA pairs by `{layer}.{projection}`, and their scales."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT_1:
            raise StorageFailed(f"{path} is not a file of {_FORMAT_1}")
        lora: dict[ModuleKey, LoRAPair] = {}
        for key, scale in json.loads(metadata["scales"]).items():
            layer, _, name = key.partition(".")
            projection = next(p for p in PROJECTIONS if p == name)
            a, b = file.get_tensor(f"{key}.A"), file.get_tensor(f"{key}.B")
            lora[int(layer), projection] = LoRAPair(a, b, float(scale))
    return AdapterWeights(lora)
