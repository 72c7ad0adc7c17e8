"""Sweeps of a bucket that several servers share, over a real PostgreSQL and a local S3 server."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest

from loraplex_memory.adapter_file import read_adapter_file
from loraplex_server.adapters import adapter_files
from loraplex_server.adapters.registration import Registration
from tests.support.object_store import ObjectStore, running_object_store, why_no_object_store

#: In place of an hour. S3 tells the age of objects in whole seconds.
GRACE_S = 1.0


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    if (reason := why_no_object_store()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(adapter_files, "SHARED_GRACE_S", GRACE_S)
    from s3fs import S3FileSystem

    with running_object_store(tmp_path) as store:
        for name, value in store.env.items():
            monkeypatch.setenv(name, value)
        S3FileSystem.clear_instance_cache()  # one would go on with another test's server
        yield store
        S3FileSystem.clear_instance_cache()


def at_next_delete(catalog, monkeypatch, act) -> None:
    """Do something right before the bucket is next asked to delete a file."""
    files = catalog._store.files._blobs._fs
    delete = files.rm_file

    def delete_late(path: str) -> None:
        monkeypatch.setattr(files, "rm_file", delete)
        act()
        delete(path)

    monkeypatch.setattr(files, "rm_file", delete_late)


def read(catalog, name: str) -> bool:
    with catalog.acquire(name) as lease:
        return bool(read_adapter_file(Path(lease.manifest.path)).lora)


def kept(catalog) -> list[str]:
    """Return the adapters' files that there are, wherever sweeps have put them."""
    found = catalog._store.files._blobs._fs.ls("adapters/blobs", detail=False)
    return [path for path in found if not path.endswith("/registry-id")]


def test_content_registered_again_while_it_is_swept_is_not_lost(
    open_replica, folders, bucket: ObjectStore, monkeypatch
):
    first, second, third = (open_replica(name, blob_url=bucket.url) for name in "abc")
    record, _ = first.register(Registration("n"), folders[0])
    first.delete("n")
    time.sleep(GRACE_S + 1.1)
    # The file is old and has no row; while its deletion is on its way, another server stores it.
    at_next_delete(first, monkeypatch, partial(second.register, Registration("m"), folders[0]))
    first.sweep()
    assert second.get("m").id == record.id
    assert read(third, "m")
    time.sleep(GRACE_S + 1.1)
    for catalog in (first, second):
        catalog.sweep()
    file = f"adapters/blobs/{record.id.removeprefix('sha256:')}.safetensors"
    assert kept(first) == [file]
    assert read(open_replica("d", blob_url=bucket.url), "m")


def test_a_sweep_brings_back_what_nobody_has_read_meanwhile(
    open_replica, folders, bucket: ObjectStore, monkeypatch
):
    first, second = (open_replica(name, blob_url=bucket.url) for name in "ab")
    record, _ = first.register(Registration("n"), folders[0])
    first.delete("n")
    time.sleep(GRACE_S + 1.1)
    at_next_delete(first, monkeypatch, partial(second.register, Registration("m"), folders[0]))
    first.sweep()
    second.sweep()
    file = f"adapters/blobs/{record.id.removeprefix('sha256:')}.safetensors"
    assert file in kept(first)
