"""Adapter files by content: what is under an id never changes, and is whole or absent.

    <digest>.safetensors    the canonical file, which the engine reads
    <digest>.native.tar     the uploaded files, where the canonical one was computed from them
    <file>.<time>-<token>.aside     one that was about to be deleted, from its Unix time on

No store promises that a file is deleted only if nobody has put it again. So one that several
servers use never loses content in one step (decision 33): a sweep moves a file to a name that is
used once, whoever finds the file missing brings it back, and a later sweep deletes it or brings it
back, as the registry says then. What object stores have brought back keeps its copy for its time:
the delete that made the file go may be tried again by a client library, and come behind that.

The store is any fsspec file system; a local folder is used in place. From a remote store, a file
is copied once into a local cache, because the engine maps local files.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Final

from fsspec.core import url_to_fs

from loraplex_server.adapters.identity import ID_PREFIX
from loraplex_server.adapters.local_copies import LocalCopies

_SUFFIX: Final = ".safetensors"
_NATIVE_SUFFIX: Final = ".native.tar"
_PART_SUFFIX: Final = ".part"
_ASIDE_SUFFIX: Final = ".aside"
#: What has buckets and no folders: there `makedirs` would make a bucket out of a misspelt name.
_OBJECT_STORES: Final = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "az"})
#: Says whose files these are.
_OWNER_NAME: Final = "registry-id"


class BlobStore:
    """Owned by the catalogue; safe from any thread, since every file appears by a rename.

    Every method raises OSError when the file system fails.
    """

    def __init__(self, url: str, *, copies: LocalCopies) -> None:
        """Open the store and make its folder.

        Args:
            url: a local folder, or what fsspec takes (`s3://bucket/folder`).
            copies: of a remote store's files; unused by a local one.
        """
        self._fs, self._root = _open_fs(url)
        self._is_local = _is_local(self._fs)
        self._copies = copies
        if not _OBJECT_STORES.intersection(_protocols(self._fs)):
            with self._failures():
                self._fs.makedirs(self._root, exist_ok=True)

    def claim(self, owner: str) -> str | None:
        """Make the place that of a registry, unless it is another one's.

        Returns:
            The file that says whose the place is, if it is another one's: `sweep` would delete
            what that one refers to.
        """
        path = f"{self._root}/{_OWNER_NAME}"
        with self._failures():
            try:
                found = self._fs.cat_file(path).decode(errors="replace")
            except FileNotFoundError:
                self._sign(path, owner)
                return None
        return None if found == owner else str(self._fs.unstrip_protocol(path))

    def _sign(self, path: str, owner: str) -> None:
        try:
            self._fs.pipe_file(path, owner.encode())
        except FileNotFoundError as error:
            raise OSError(f"blob_url names no bucket that is there ({error}): make it") from error

    def put(self, adapter_id: str, file: Path) -> None:
        """Move the local `file` into the store, durably; replaces the same content."""
        self._put(self._path(adapter_id), file)
        if not self._is_local:
            self._copies.take(adapter_id, file)

    def put_native(self, adapter_id: str, file: Path) -> None:
        """Keep a tar of the uploaded files beside the canonical one, likewise."""
        self._put(self._path(adapter_id, _NATIVE_SUFFIX), file)
        file.unlink(missing_ok=True)

    def _put(self, target: str, file: Path) -> None:
        """Move a file into a local store; copy it into a remote one."""
        # Of a name of its own: others may be putting the same content.
        part = f"{target}.{secrets.token_hex(8)}{_PART_SUFFIX}"
        if self._is_local:
            _move_durably(file, Path(part), Path(target))
            return
        with self._failures():
            self._fs.put_file(str(file), part)
            self._fs.mv(part, target)

    def local_path(self, adapter_id: str) -> Path:
        """Return the content as a local file; raises FileNotFoundError if it is not stored."""
        try:
            return self._fetched(adapter_id)
        except FileNotFoundError:
            if not self._bring_back(_file_name(adapter_id)):
                raise
        return self._fetched(adapter_id)

    def _fetched(self, adapter_id: str) -> Path:
        if (found := self.local_copy(adapter_id)) is not None:
            return found
        if self._is_local:
            raise FileNotFoundError(self._path(adapter_id))
        return self._copies.fetch(adapter_id, self._download)

    def _download(self, adapter_id: str, to: Path) -> None:
        with self._failures():
            self._fs.get_file(self._path(adapter_id), str(to))

    def local_copy(self, adapter_id: str) -> Path | None:
        """Return the content as a local file if it is one already."""
        if not self._is_local:
            return self._copies.find(adapter_id)
        path = Path(self._path(adapter_id))
        return path if path.exists() else None

    def delete(self, adapter_id: str) -> int:
        """Remove the content here and in the cache; absent is fine. Returns bytes freed here."""
        num_bytes = 0
        for suffix in (_SUFFIX, _NATIVE_SUFFIX):
            path = self._path(adapter_id, suffix)
            with contextlib.suppress(FileNotFoundError), self._failures():
                size_bytes = self._fs.size(path) or 0
                self._fs.rm_file(path)
                num_bytes += size_bytes
        self.forget(adapter_id)
        return num_bytes

    def forget(self, adapter_id: str) -> None:
        """Remove the content from this machine's cache, if there is one."""
        if not self._is_local:
            self._copies.remove(adapter_id)

    def sweep(self, keep: Callable[[], Collection[str]], *, min_age_s: float = 0.0) -> list[str]:
        """Delete unfinished files and every id not kept; returns the ids.

        Args:
            keep: called after the files were listed, so that what was registered since is kept.
            min_age_s: leave younger files alone, and set others aside for so long before they are
                deleted; 0 only where nobody else may be putting.
        """
        listed = [self._name_of(path) for path in self._list()]
        kept = keep()
        for name in listed:
            if name.endswith(_PART_SUFFIX) and self._is_older((name,), min_age_s):
                self._delete_file(name)
            elif name.endswith(_ASIDE_SUFFIX):
                self._settle_aside(name, kept, min_age_s)
        deleted = []
        for adapter_id in sorted(set(filter(None, map(_id_of, listed))).difference(kept)):
            names = [_file_name(adapter_id, suffix) for suffix in (_SUFFIX, _NATIVE_SUFFIX)]
            # Right before: it may have been put again since, to be registered next.
            if not self._is_older(names, min_age_s):
                continue
            if min_age_s:
                self._set_aside(names)
            else:
                self.delete(adapter_id)
            deleted.append(adapter_id)
        return deleted

    def _set_aside(self, names: Collection[str]) -> None:
        """Move files away, each to a name that nobody else uses."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                stamp = f"{int(time.time())}-{secrets.token_hex(8)}"
                self._move(name, f"{name}.{stamp}{_ASIDE_SUFFIX}")

    def _settle_aside(self, aside: str, kept: Collection[str], min_age_s: float) -> None:
        """Bring a file back if its id is kept and it is missing; else delete it in its time."""
        name, _, stamp = aside.removesuffix(_ASIDE_SUFFIX).rpartition(".")
        since = stamp.partition("-")[0]
        if not since.isdecimal():  # not ours
            return
        if _id_of(name) in kept and not self._exists(name):
            with contextlib.suppress(FileNotFoundError):  # another server was faster
                self._restore(aside, name)
        elif time.time() - int(since) >= min_age_s:
            self._delete_file(aside)

    def _bring_back(self, name: str) -> bool:
        """Bring a file back that a sweep set aside while it was registered; whether there was one.

        Whoever asks has read a row that refers to it.
        """
        with self._failures():
            # The prefix spares object stores a list of everything; others do not know it.
            found = list(map(self._name_of, self._fs.find(self._root, prefix=name)))
        asides = [path for path in found if _is_aside_of(path, name)]
        for aside in asides:
            with contextlib.suppress(FileNotFoundError):  # somebody was faster
                self._restore(aside, name)
                break
        return bool(asides)

    def _restore(self, aside: str, name: str) -> None:
        """Give what was set aside its own name again; see the module for what stays."""
        if self._is_local:
            self._rename(aside, name)
        else:
            self._copy(aside, name)

    def _move(self, source: str, target: str) -> None:
        if self._is_local:
            self._rename(source, target)
        else:
            self._copy(source, target)
            with self._failures():
                self._fs.rm_file(f"{self._root}/{source}")

    def _rename(self, source: str, target: str) -> None:
        """Move a local file, which takes no room."""
        with self._failures():
            Path(self._root, source).replace(Path(self._root, target))

    def _copy(self, source: str, target: str) -> None:
        with self._failures():
            self._fs.cp_file(f"{self._root}/{source}", f"{self._root}/{target}")

    def _exists(self, name: str) -> bool:
        with self._failures():
            return bool(self._fs.exists(f"{self._root}/{name}"))

    def _delete_file(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._failures():
            self._fs.rm_file(f"{self._root}/{name}")

    def _list(self) -> list[Any]:
        with contextlib.suppress(FileNotFoundError), self._failures():
            return list(self._fs.ls(self._root, detail=False))
        return []  # an object store has no empty folders

    def _name_of(self, path: Any) -> str:
        return PurePosixPath(str(path)).name

    def _is_older(self, names: Collection[str], min_age_s: float) -> bool:
        """Whether the youngest of the files is so old, as far as anybody can tell."""
        if not min_age_s:
            return True
        ages = [age for name in names if (age := self._age_s(name)) is not None]
        return bool(ages) and min(ages) >= min_age_s

    def _age_s(self, name: str) -> float | None:
        """Return how old a file is; None where it is gone, 0 where nobody can tell."""
        try:
            with self._failures():
                modified = self._fs.modified(f"{self._root}/{name}")
        except FileNotFoundError:
            return None
        except NotImplementedError:
            return 0.0
        if modified.tzinfo is None:
            modified = modified.replace(tzinfo=UTC)
        return float((datetime.now(UTC) - modified).total_seconds())

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Tell what libraries of object stores raise, each its own, as OSError."""
        try:
            yield
        except PermissionError as error:
            if self._is_local:
                raise
            raise OSError(
                f"the store of adapter files, blob_url, refuses it ({error}): the credentials "
                "need rights to list, read, write and delete there"
            ) from error
        except (OSError, NotImplementedError):
            raise
        except Exception as error:
            raise OSError(
                "the store of adapter files, blob_url, does not answer as it should: "
                f"{error or type(error).__name__}"
            ) from error

    def _path(self, adapter_id: str, suffix: str = _SUFFIX) -> str:
        return f"{self._root}/{_file_name(adapter_id, suffix)}"


def _open_fs(url: str) -> tuple[Any, str]:
    try:
        # Without a cache of what is there and since when: other servers put and delete files too.
        fs, root = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise OSError(
            f"what reads blob_url is not installed ({error}): for s3:// pip install "
            "'loraplex[s3]', for gs:// 'loraplex[gcs]'"
        ) from error
    except ValueError as error:
        raise OSError(f"blob_url is no URL such as s3://bucket/folder: {error}") from error
    return fs, str(root).rstrip("/")


def _is_local(fs: Any) -> bool:
    return "file" in _protocols(fs)


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _file_name(adapter_id: str, suffix: str = _SUFFIX) -> str:
    return adapter_id.removeprefix(ID_PREFIX) + suffix


def _is_aside_of(path: str, name: str) -> bool:
    return path.startswith(f"{name}.") and path.endswith(_ASIDE_SUFFIX)


def _id_of(name: str) -> str | None:
    """Return whose file has this name; None of other files."""
    for suffix in (_SUFFIX, _NATIVE_SUFFIX):
        if name.endswith(suffix):
            return ID_PREFIX + name.removesuffix(suffix)
    return None


def _move_durably(file: Path, part: Path, target: Path) -> None:
    """Move a file, by way of `part` on the target's disk where it comes from another one."""
    _sync(file)
    try:
        file.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copyfile(file, part)
        _sync(part)
        part.replace(target)
        file.unlink()
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, not only in the kernel's cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
