"""Adapter files by content: what is under an id never changes, and is whole or absent.

    <digest>.safetensors    the canonical file, which the engine reads
    <digest>.native.tar     the uploaded files, where the canonical one was computed from them

The store is any fsspec file system; a local folder is used in place. From a remote store, a file
is copied once into a local cache, because the engine maps local files.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Final

from fsspec.core import url_to_fs

from loraplex_server.adapters.identity import ID_PREFIX

_SUFFIX: Final = ".safetensors"
_NATIVE_SUFFIX: Final = ".native.tar"
_PART_SUFFIX: Final = ".part"


class BlobStore:
    """Owned by the catalogue; safe from any thread, since every file appears by a rename.

    Every method raises OSError when the file system fails.
    """

    def __init__(self, url: str, *, cache_dir: Path) -> None:
        """Open the store and make its folder.

        Args:
            url: a local folder, or what fsspec takes (`s3://bucket/folder`).
            cache_dir: where files of a remote store are copied to; unused by a local one.
        """
        self._fs, self._root = _open_fs(url)
        self._is_local = _is_local(self._fs)
        self._cache_dir = cache_dir
        self._fs.makedirs(self._root, exist_ok=True)

    def put(self, adapter_id: str, file: Path) -> None:
        """Move the local `file` into the store, durably; replaces the same content.

        `file` must be on the store's own disk if the store is local.
        """
        self._put(self._path(adapter_id), file)

    def put_native(self, adapter_id: str, file: Path) -> None:
        """Keep a tar of the uploaded files beside the canonical one, likewise."""
        self._put(self._path(adapter_id, _NATIVE_SUFFIX), file)

    def _put(self, target: str, file: Path) -> None:
        if self._is_local:
            _sync(file)
            file.replace(target)
            _sync(Path(self._root))
            return
        part = f"{target}.{file.name}{_PART_SUFFIX}"
        self._fs.put_file(str(file), part)
        self._fs.mv(part, target)
        file.unlink()

    def local_path(self, adapter_id: str) -> Path:
        """Return the content as a local file; raises FileNotFoundError if it is not stored."""
        if self._is_local:
            path = Path(self._path(adapter_id))
        else:
            path = self._cache_dir / _file_name(adapter_id)
            if not path.exists():
                self._download(adapter_id, path)
        path.stat()
        return path

    def delete(self, adapter_id: str) -> int:
        """Remove the content here and in the cache; absent is fine. Returns bytes freed here."""
        num_bytes = 0
        for suffix in (_SUFFIX, _NATIVE_SUFFIX):
            path = self._path(adapter_id, suffix)
            with contextlib.suppress(FileNotFoundError):
                size_bytes = self._fs.size(path) or 0
                self._fs.rm_file(path)
                num_bytes += size_bytes
        self.forget(adapter_id)
        return num_bytes

    def forget(self, adapter_id: str) -> None:
        """Remove the content from this machine's cache, if there is one."""
        if not self._is_local:
            (self._cache_dir / _file_name(adapter_id)).unlink(missing_ok=True)

    def sweep(self, keep: Callable[[], Collection[str]], *, min_age_s: float = 0.0) -> list[str]:
        """Delete unfinished files and every id not kept; returns the ids deleted.

        Args:
            keep: called after the files were listed, so that what was registered since is kept.
            min_age_s: leave younger files alone; 0 only where nobody else may be putting.
        """
        listed = [self._name_of(path) for path in self._fs.ls(self._root, detail=False)]
        old = [name for name in listed if not min_age_s or self._age_s(name) >= min_age_s]
        kept = keep()
        for name in old:
            if name.endswith(_PART_SUFFIX):
                self._fs.rm_file(f"{self._root}/{name}")
        ids = {
            ID_PREFIX + name.removesuffix(suffix)
            for name in old
            for suffix in (_SUFFIX, _NATIVE_SUFFIX)
            if name.endswith(suffix)
        }
        orphans = sorted(ids.difference(kept))
        if min_age_s:
            # Some may have been put again since they were listed, to be registered next.
            orphans = [i for i in orphans if self._age_s(_file_name(i)) >= min_age_s]
        for adapter_id in orphans:
            self.delete(adapter_id)
        return orphans

    def _name_of(self, path: Any) -> str:
        return PurePosixPath(str(path)).name

    def _age_s(self, name: str) -> float:
        """Return how old a file is; 0 where it has just gone, or nobody can tell."""
        try:
            modified = self._fs.modified(f"{self._root}/{name}")
        except (FileNotFoundError, NotImplementedError):
            return 0.0
        if modified.tzinfo is None:
            modified = modified.replace(tzinfo=UTC)
        return float((datetime.now(UTC) - modified).total_seconds())

    def _download(self, adapter_id: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, suffix=_PART_SUFFIX)
        os.close(handle)
        try:
            self._fs.get_file(self._path(adapter_id), part)
            Path(part).replace(path)
        finally:
            Path(part).unlink(missing_ok=True)

    def _path(self, adapter_id: str, suffix: str = _SUFFIX) -> str:
        return f"{self._root}/{_file_name(adapter_id, suffix)}"


def _open_fs(url: str) -> tuple[Any, str]:
    fs, root = url_to_fs(url)
    return fs, str(root).rstrip("/")


def _is_local(fs: Any) -> bool:
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return "file" in protocols


def _file_name(adapter_id: str, suffix: str = _SUFFIX) -> str:
    return adapter_id.removeprefix(ID_PREFIX) + suffix


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, not only in the kernel's cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
