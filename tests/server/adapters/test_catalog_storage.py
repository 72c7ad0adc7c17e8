"""Restarts, full disks, damaged databases: the catalogue keeps what it promised or says so."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex_memory.adapter_file import read_adapter_file
from loraplex_memory.layout import ModelGeometry, PoolLayout
from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.errors import BaseNameTaken, StorageFailed
from loraplex_server.adapters.folder_reader import FolderReader
from loraplex_server.adapters.registration import Registration
from tests.support.adapters import BASE_NAME, TINY, make_catalog, make_folder, tiny_base_model


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[AdapterCatalog]:
    catalog = make_catalog(tmp_path / "data")
    yield catalog
    catalog.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "adapter")


@pytest.fixture
def other_folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "other", seed=1)


def blobs(tmp_path: Path) -> set[str]:
    return {f"sha256:{path.stem}" for path in (tmp_path / "data" / "blobs").iterdir()}


def staging(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "data" / "staging").iterdir())


def test_everything_survives_a_restart(tmp_path, folder, other_folder):
    catalog = make_catalog(tmp_path / "data")
    records = [catalog.register(Registration(name), folder)[0] for name in ("a", "b")]
    catalog.register(Registration("gone"), other_folder)
    catalog.delete("gone")
    catalog.close()
    catalog.close()
    catalog = make_catalog(tmp_path / "data")
    assert catalog.list() == tuple(records)
    with catalog.acquire("b") as lease:
        assert read_adapter_file(Path(lease.manifest.path))
    catalog.close()


def test_a_start_sweeps_what_a_killed_process_left(tmp_path, folder):
    catalog = make_catalog(tmp_path / "data")
    record, _ = catalog.register(Registration("a"), folder)
    catalog.close()
    half_upload = tmp_path / "data" / "staging" / "upload-x" / "adapter"
    half_upload.mkdir(parents=True)
    (half_upload / "adapter_model.safetensors").write_text("half")
    orphan = tmp_path / "data" / "blobs" / ("0" * 64 + ".safetensors")
    orphan.write_text("nobody's")
    catalog = make_catalog(tmp_path / "data")
    assert blobs(tmp_path) == {record.id}
    assert staging(tmp_path) == []
    catalog.close()


def test_a_start_drops_copies_that_a_power_cut_left_incomplete(tmp_path, folder):
    files = f"memory://{tmp_path.name}/blobs"
    catalog = make_catalog(tmp_path / "data", blob_url=files)
    catalog.register(Registration("a"), folder)
    with catalog.acquire("a") as lease:
        copy = Path(lease.manifest.path)
    catalog.close()
    copy.write_bytes(b"")
    catalog = make_catalog(tmp_path / "data", blob_url=files)
    with catalog.acquire("a") as lease:
        assert read_adapter_file(Path(lease.manifest.path)).lora
    catalog.close()


def test_another_base_in_the_same_folder_sees_none_of_it_and_harms_none(tmp_path, folder, caplog):
    catalog = make_catalog(tmp_path / "data")
    record, _ = catalog.register(Registration("a"), folder)
    catalog.close()
    assert "other base models" not in caplog.text
    other = make_catalog(tmp_path / "data", base_name="other-base")
    assert "the registry has 1 adapters, all of other base models" in caplog.text
    assert other.list() == ()
    other.register(Registration("a", check_base=False), folder)
    other.delete("a")
    other.close()
    taller = ModelGeometry(**{**vars(TINY), "num_layers": 3})
    tall = AdapterCatalog(
        data_dir=tmp_path / "data",
        pool_layout=PoolLayout(taller),
        base_name=BASE_NAME,
        reader=FolderReader(tiny_base_model(), (BASE_NAME,)),
    )
    assert tall.list() == ()
    tall.close()
    catalog = make_catalog(tmp_path / "data")
    assert catalog.get("a") == record
    assert blobs(tmp_path) == {record.id}
    catalog.close()


def test_a_renamed_base_keeps_its_adapters_under_one_base_id(tmp_path, folder):
    catalog = make_catalog(tmp_path / "data", base_id="/models/x")
    record, _ = catalog.register(Registration("a"), folder)
    catalog.close()
    renamed = make_catalog(tmp_path / "data", base_name="new-name", base_id="/models/x")
    assert renamed.get("a") == record
    renamed.close()


def test_a_data_folder_serves_one_process_at_a_time(catalog, tmp_path):
    with pytest.raises(StorageFailed, match="another process"):
        make_catalog(tmp_path / "data")
    catalog.close()
    make_catalog(tmp_path / "data").close()


def test_a_database_of_another_version_is_refused(tmp_path):
    make_catalog(tmp_path / "data").close()
    connection = sqlite3.connect(tmp_path / "data" / "catalog.sqlite3")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StorageFailed, match="schema version 99"):
        make_catalog(tmp_path / "data")


def test_a_damaged_database_is_told_as_such(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "catalog.sqlite3").write_bytes(b"not a database" * 500)
    with pytest.raises(StorageFailed, match="database"):
        make_catalog(tmp_path / "data")


def test_a_lost_file_is_told_and_healed_by_uploading_again(catalog, folder, tmp_path):
    record, _ = catalog.register(Registration("a"), folder)
    for path in (tmp_path / "data" / "blobs").iterdir():
        path.unlink()
    with pytest.raises(StorageFailed, match="upload it again"):
        catalog.acquire("a")
    assert catalog.num_leases(record.id) == 0
    assert catalog.register(Registration("a"), folder) == (record, False)
    with catalog.acquire("a") as lease:
        assert read_adapter_file(Path(lease.manifest.path))


def fail_with(error: Exception):
    def fail(*_args: object, **_kwargs: object) -> None:
        raise error

    return fail


def test_a_full_disk_registers_nothing_and_says_what_to_do(catalog, folder, tmp_path, monkeypatch):
    target = "loraplex_server.adapters.blobs.os.fsync"
    monkeypatch.setattr(target, fail_with(OSError(28, "No space left on device")))
    with pytest.raises(StorageFailed, match="disk is full"):
        catalog.register(Registration("a"), folder)
    monkeypatch.undo()
    assert catalog.list() == ()
    assert blobs(tmp_path) == set()
    assert staging(tmp_path) == []
    assert catalog.register(Registration("a"), folder)[1]


def test_a_database_that_cannot_commit_leaves_no_half_state(
    catalog, folder, other_folder, tmp_path
):
    first, _ = catalog.register(Registration("a"), folder)
    blocker = sqlite3.connect(tmp_path / "data" / "catalog.sqlite3")
    blocker.execute(
        "CREATE TRIGGER full BEFORE INSERT ON names BEGIN SELECT RAISE(ABORT, 'disk full'); END"
    )
    blocker.commit()
    with pytest.raises(StorageFailed, match="disk full"):
        catalog.register(Registration("b"), other_folder)
    assert catalog.list() == (first,)
    assert blobs(tmp_path) == {first.id}
    blocker.execute("DROP TRIGGER full")
    blocker.commit()
    blocker.close()
    assert catalog.register(Registration("b"), other_folder)[1]


def test_a_file_that_cannot_be_deleted_does_not_fail_the_delete(
    catalog, folder, tmp_path, monkeypatch
):
    record, _ = catalog.register(Registration("a"), folder)
    files = catalog._store.files._blobs
    monkeypatch.setattr(files, "delete", fail_with(PermissionError(13, "denied")))
    assert catalog.delete("a").record == record
    assert blobs(tmp_path) == {record.id}


def test_a_base_with_the_name_of_its_adapter_does_not_start(tmp_path, folder):
    catalog = make_catalog(tmp_path / "data", base_id="x")
    catalog.register(Registration("Team/Sql"), folder)
    catalog.close()
    with pytest.raises(BaseNameTaken) as refusal:
        make_catalog(tmp_path / "data", base_id="x", base_name="team/SQL")
    for words in ("'Team/Sql'", "--served-model-name", "loraplex adapters rm Team/Sql"):
        assert words in str(refusal.value)
    make_catalog(tmp_path / "data", base_id="y", base_name="team/SQL").close()
    catalog = make_catalog(tmp_path / "data", base_id="x")
    catalog.delete("Team/Sql")
    catalog.close()
    make_catalog(tmp_path / "data", base_id="x", base_name="team/SQL").close()
