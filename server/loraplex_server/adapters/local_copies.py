"""This machine's copies of adapter files that are kept elsewhere.

The engine maps local files, so what it is to use of an object store is copied once. Any copy may go
while nobody holds its adapter: it would be fetched again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from loraplex_server.adapters.identity import ID_PREFIX

_log = logging.getLogger(__name__)

_SUFFIX: Final = ".safetensors"
_PART_SUFFIX: Final = ".part"
#: Of the disk, for all else that writes there, and for what is fetched before room is made again.
_FREE_SHARE: Final = 0.1


class LocalCopies:
    """Owned by the catalogue; safe from any thread, since every file appears by a rename.

    Every method raises OSError when the disk fails.

    Args:
        folder: theirs alone; made when the first one is.
        max_bytes: of all together; None for as many as leave a tenth of the disk free.
    """

    def __init__(self, folder: Path, max_bytes: int | None = None) -> None:
        self._folder = folder
        self._max_bytes = max_bytes

    def find(self, adapter_id: str) -> Path | None:
        """Return the copy of an adapter's file if there is one, which counts as its use."""
        path = self._path(adapter_id)
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def fetch(self, adapter_id: str, download: Callable[[str, Path], None]) -> Path:
        """Make a copy and return it.

        Args:
            download: writes the content of an adapter's file to a path.
        """
        path = self._path(adapter_id)
        self._folder.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=self._folder, suffix=_PART_SUFFIX)
        os.close(handle)
        try:
            download(adapter_id, Path(part))
            Path(part).replace(path)
        finally:
            Path(part).unlink(missing_ok=True)
        return path

    def take(self, adapter_id: str, file: Path) -> None:
        """Make a file that was stored elsewhere the copy, in place of any that may be damaged."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file.replace(self._path(adapter_id))
        except OSError as error:
            # It is stored, and that is what was asked for.
            _log.warning("%s is not kept on this machine's disk: %s", adapter_id, error)
            with contextlib.suppress(OSError):
                file.unlink()
                self.remove(adapter_id)

    def remove(self, adapter_id: str) -> None:
        """Remove a copy, if there is one."""
        self._path(adapter_id).unlink(missing_ok=True)

    def sweep(self, keep: Mapping[str, int]) -> None:
        """Delete all copies but those of these ids, and those that are not whole.

        A copy that no disk had yet when the power went may have its name and not its content.

        Args:
            keep: how many bytes each has. Nobody may be reading any other.
        """
        for path, found in self._found():
            if keep.get(self._id_of(path)) != found.st_size:
                path.unlink(missing_ok=True)

    def make_room(self, remove: Callable[[str], bool]) -> None:
        """Have those removed that were used longest ago, until there is room again.

        Args:
            remove: removes an adapter's copy, unless somebody holds it; whether it has.
        """
        found = sorted(self._found(), key=lambda each: each[1].st_mtime)
        excess = self._excess(sum(each.st_size for _, each in found))
        for path, each in found:
            if excess <= 0:
                return
            if path.suffix == _SUFFIX and remove(self._id_of(path)):
                excess -= each.st_size

    def _excess(self, num_bytes: int) -> float:
        if self._max_bytes is not None:
            return num_bytes - self._max_bytes
        if not num_bytes:
            return 0
        disk = shutil.disk_usage(self._folder)
        return _FREE_SHARE * disk.total - disk.free

    def _found(self) -> list[tuple[Path, os.stat_result]]:
        """Return all files and what is known of them; those that go meanwhile are left out."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for path in self._folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    found.append((path, path.stat()))
        return found

    def _path(self, adapter_id: str) -> Path:
        return self._folder / (adapter_id.removeprefix(ID_PREFIX) + _SUFFIX)

    def _id_of(self, path: Path) -> str:
        return ID_PREFIX + path.name.removesuffix(_SUFFIX)
