"""The content store, in a local folder and in a remote store (fsspec's memory file system)."""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import httpx
import pytest

from loraplex_server.adapters.blobs import BlobStore
from loraplex_server.adapters.local_copies import LocalCopies
from tests.support.object_store import running_object_store, why_no_object_store

ID, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64


@pytest.fixture(params=["local", "remote"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], BlobStore]:
    url = str(tmp_path / "blobs") if request.param == "local" else f"memory://{uuid.uuid4()}/blobs"
    return lambda: BlobStore(url, copies=LocalCopies(tmp_path / "cache"))


def make_file(folder: Path, content: bytes = b"weights") -> Path:
    path = folder / "new.safetensors"
    path.write_bytes(content)
    return path


def test_what_was_put_is_a_local_file_also_after_reopening(open_store, tmp_path: Path):
    open_store().put(ID, make_file(tmp_path))
    store = open_store()
    assert store.local_path(ID).read_bytes() == b"weights"
    assert not (tmp_path / "new.safetensors").exists()


def test_putting_again_replaces(open_store, tmp_path: Path):
    store = open_store()
    store.put(ID, make_file(tmp_path, b"damaged"))
    store.put(ID, make_file(tmp_path))
    assert store.local_path(ID).read_bytes() == b"weights"


def test_a_folder_on_another_disk_is_a_store_too(tmp_path: Path, monkeypatch):
    replace = Path.replace

    def replace_on_one_disk(path: Path, target: str | Path) -> Path:
        if path.parent != Path(target).parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(path))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", replace_on_one_disk)
    store = BlobStore(str(tmp_path / "blobs"), copies=LocalCopies(tmp_path / "cache"))
    file = make_file(tmp_path)
    store.put(ID, file)
    assert store.local_path(ID).read_bytes() == b"weights"
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == [store.local_path(ID).name]
    assert not file.exists()


def test_a_place_is_of_the_first_who_claims_it(open_store):
    assert open_store().claim("first") is None
    assert open_store().claim("first") is None
    assert str(open_store().claim("second")).endswith("blobs/registry-id")
    assert open_store().sweep(lambda: ()) == []
    assert open_store().claim("second") is not None


def test_a_bucket_that_is_not_there_or_not_ours_says_what_to_do(tmp_path, monkeypatch):
    if (reason := why_no_object_store()) is not None:
        pytest.skip(reason)
    with running_object_store(tmp_path) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(OSError, match="names no bucket that is there"):
            BlobStore("s3://misspelt/files", copies=LocalCopies(tmp_path / "cache")).claim("first")
        assert "misspelt" not in httpx.get(server.endpoint, timeout=30).text
        # From now on the server lets nobody in whom it does not know.
        httpx.post(f"{server.endpoint}/moto-api/reset-auth", content="0", timeout=30)
        with pytest.raises(OSError, match="rights to list, read, write and delete"):
            BlobStore(server.url, copies=LocalCopies(tmp_path / "cache")).claim("first")
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # it would ask this server for ever


def test_absent_content_is_a_missing_file_and_deleting_it_is_fine(open_store):
    store = open_store()
    with pytest.raises(FileNotFoundError):
        store.local_path(ID)
    store.delete(ID)


def test_delete_removes_the_content_and_its_copy(open_store, tmp_path: Path):
    store = open_store()
    store.put(ID, make_file(tmp_path))
    path = store.local_path(ID)
    store.delete(ID)
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        store.local_path(ID)


def test_sweep_deletes_what_nobody_refers_to(open_store, tmp_path: Path):
    store = open_store()
    store.put(ID, make_file(tmp_path))
    store.put(OTHER, make_file(tmp_path))
    assert store.sweep(keep=lambda: {ID}) == [OTHER]
    assert store.local_path(ID).exists()
    assert store.sweep(keep=lambda: {ID}) == []


def test_sweep_leaves_what_was_put_again_since_it_was_listed(tmp_path: Path):
    store = BlobStore(str(tmp_path / "blobs"), copies=LocalCopies(tmp_path / "cache"))
    for adapter_id in (ID, OTHER):
        store.put(adapter_id, make_file(tmp_path))
        os.utime(store.local_path(adapter_id), (0, 0))

    def keep() -> set[str]:
        store.put(ID, make_file(tmp_path))  # another server, about to register it
        return set()

    assert store.sweep(keep, min_age_s=60.0) == [OTHER]
    assert store.local_path(ID).exists()


def test_sweep_leaves_foreign_files_and_removes_unfinished_ones(tmp_path: Path):
    store = BlobStore(str(tmp_path), copies=LocalCopies(tmp_path / "cache"))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "x.safetensors.part").write_text("half")
    assert store.sweep(keep=set) == []
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_delete_that_is_tried_again_takes_nothing_that_was_brought_back(tmp_path: Path):
    url = f"memory://{uuid.uuid4()}/blobs"
    store, elsewhere = (
        BlobStore(url, copies=LocalCopies(tmp_path / name)) for name in ("here", "there")
    )
    store.put(ID, make_file(tmp_path))
    store.forget(ID)
    files, path = store._fs, store._path(ID)
    files.store[path].modified = datetime.fromtimestamp(0, UTC)
    assert store.sweep(set, min_age_s=60.0) == [ID]
    assert store.local_path(ID).read_bytes() == b"weights"
    files.rm_file(path)  # as client libraries do that were not told of their success
    assert elsewhere.local_path(ID).read_bytes() == b"weights"
    files.rm_file(path)
    for _ in range(2):
        assert store.sweep(lambda: {ID}, min_age_s=60.0) == []
        assert files.cat_file(path) == b"weights"
        files.rm_file(path)


def test_what_is_shared_is_set_aside_before_it_is_deleted(tmp_path: Path, monkeypatch):
    folder = tmp_path / "blobs"
    store = BlobStore(str(folder), copies=LocalCopies(tmp_path / "cache"))
    for adapter_id in (ID, OTHER):
        store.put(adapter_id, make_file(tmp_path))
        os.utime(store.local_path(adapter_id), (0, 0))
    assert store.sweep(set, min_age_s=60.0) == [ID, OTHER]
    assert store.local_copy(ID) is None
    assert store.sweep(lambda: {ID}, min_age_s=60.0) == []
    assert store.local_copy(ID) is not None, "what is registered comes back"
    assert store.local_path(OTHER).read_bytes() == b"weights", "and what somebody asks for"
    assert store.sweep(lambda: {ID}, min_age_s=60.0) == [OTHER]
    later = time.time() + 61
    monkeypatch.setattr(time, "time", lambda: later)
    store.sweep(lambda: {ID}, min_age_s=60.0)
    assert [path.name for path in folder.iterdir()] == [store.local_path(ID).name]
    with pytest.raises(FileNotFoundError):
        store.local_path(OTHER)
