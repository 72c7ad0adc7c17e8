"""Registries of earlier releases, of later ones, and on PostgreSQL."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy

from loraplex_memory.adapter_file import read_adapter_file
from loraplex_server.adapters.adapter_files import SHARED_GRACE_S
from loraplex_server.adapters.audit_log import Actor, read_audit
from loraplex_server.adapters.errors import (
    AdapterNameTaken,
    AdapterNotFound,
    AdapterNotOwned,
    OwnerHasEnough,
    StorageFailed,
    VersionConflict,
)
from loraplex_server.adapters.registration import OwnerLimits, Registration
from loraplex_server.adapters.version_row import NewVersion, StoredAdapter
from tests.server.adapters.conftest import wait_for_lock
from tests.support.adapters import make_catalog, make_config, make_folder, make_tensors
from tests.support.old_registries import write_registry_1, write_registry_2


def test_names_of_the_first_release_keep_their_adapters(tmp_path):
    tensors = make_tensors({"q": 3, "down": 2}, seed=4)
    old_id = write_registry_1(tmp_path / "data", tensors, name="Team/Sql")
    catalog = make_catalog(tmp_path / "data")
    record = catalog.get("Team/Sql")
    assert record.id != old_id
    assert (record.version, record.created, record.self_test_error) == (1, 1_700_000_000, None)
    config = make_config(
        r=3, lora_alpha=6, rank_pattern={"down_proj": 2}, alpha_pattern={"down_proj": 4}
    )
    folder = make_folder(tmp_path / "again", config=config, tensors=tensors)
    again, is_new = catalog.register(Registration("Team/Sql"), folder)
    assert (again.id, is_new) == (record.id, False)
    assert [path.stem for path in (tmp_path / "data" / "blobs").iterdir()] == [
        record.id.removeprefix("sha256:")
    ]
    catalog.close()
    make_catalog(tmp_path / "data").close()


def test_a_name_of_the_first_release_without_a_file_is_dropped(tmp_path):
    write_registry_1(tmp_path / "data", make_tensors())
    for file in (tmp_path / "data" / "blobs").iterdir():
        file.unlink()
    catalog = make_catalog(tmp_path / "data")
    assert catalog.list() == ()
    catalog.close()


def test_names_of_schema_2_become_first_versions(tmp_path):
    catalog = make_catalog(tmp_path / "new")
    record, _ = catalog.register(Registration("a"), make_folder(tmp_path / "adapter"))
    catalog.close()
    ranks = {"0.q": 4, "0.v": 4, "1.q": 4, "1.v": 4}
    row = (record.id, json.dumps({"ranks": ranks}), record.size_bytes)
    (tmp_path / "new" / "blobs").rename(tmp_path / "blobs")
    write_registry_2(tmp_path / "old", row)
    (tmp_path / "blobs").rename(tmp_path / "old" / "blobs")
    catalog = make_catalog(tmp_path / "old")
    found = catalog.get("a")
    assert (found.id, found.spec, found.version) == (record.id, record.spec, 1)
    with catalog.acquire("a") as lease:
        assert read_adapter_file(Path(lease.manifest.path)).lora
    catalog.close()


def test_names_of_schema_3_have_no_owner_and_are_everybodys(tmp_path):
    catalog = make_catalog(tmp_path / "data")
    catalog.register(Registration("acme/a"), make_folder(tmp_path / "adapter"))
    catalog.close()
    connection = sqlite3.connect(tmp_path / "data" / "catalog.sqlite3")
    for table in ("api_keys", "key_changes", "usage", "usage_writers", "audit"):
        connection.execute(f"DROP TABLE {table}")
    connection.executescript("""
        DROP INDEX names_owned;
        ALTER TABLE names DROP COLUMN owner;
        ALTER TABLE names DROP COLUMN readers;
        PRAGMA user_version = 3;
    """)
    connection.close()
    catalog = make_catalog(tmp_path / "data")
    record = catalog.get("acme/a")
    assert (record.owner, record.readers, record.version) == ("", ("*",), 1)
    assert catalog.change("acme/a", {"readers": ("x",)}).readers == ("x",)
    with catalog.database.connect() as opened:
        assert [entry.action for entry in read_audit(opened, limit=9)] == ["adapter.change"]
    catalog.close()


def test_an_unknown_database_is_refused_with_what_to_do(tmp_path):
    for url, words in (("nonsense", "not a database URL"), ("oracle://x", "not installed")):
        with pytest.raises(StorageFailed, match=words):
            make_catalog(tmp_path / "data", registry_url=url, blob_url=str(tmp_path / "blobs"))


def test_a_store_that_cannot_be_read_is_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    for url, words in (("s4://bucket/x", "not known: s4"), ("gs://bucket/x", "loraplex.gcs")):
        with pytest.raises(StorageFailed, match=words):
            make_catalog(tmp_path / "data", blob_url=url)


def test_files_of_another_registry_are_refused_and_not_swept(tmp_path):
    """As where LORAPLEX_REGISTRY_URL is forgotten, or is another fleet's."""
    files = {"blob_url": str(tmp_path / "files")}
    shared = {"registry_url": f"sqlite:///{tmp_path / 'registry'}", **files}
    first = make_catalog(tmp_path / "a", **shared)
    first.register(Registration("n"), make_folder(tmp_path / "f"))
    kept = set((tmp_path / "files").iterdir())
    for wrong in (files, {"registry_url": f"sqlite:///{tmp_path / 'other'}", **files}):
        with pytest.raises(StorageFailed, match="LORAPLEX_REGISTRY_URL") as refusal:
            make_catalog(tmp_path / "b", **wrong)
    assert set((tmp_path / "files").iterdir()) == kept
    make_catalog(tmp_path / "b", **shared).close()
    first.close()
    owner = tmp_path / "files" / "registry-id"
    assert str(owner) in str(refusal.value)
    owner.unlink()
    make_catalog(tmp_path / "b", **files).close()
    assert set((tmp_path / "files").iterdir()) == {owner}


def test_of_two_registries_that_claim_files_at_once_one_sweeps_them(tmp_path):
    files = tmp_path / "files"
    loser = make_catalog(tmp_path / "a", blob_url=str(files))
    owner = files / "registry-id"
    owner.unlink()  # the other one looked before this one wrote, and wrote after it
    winner = make_catalog(tmp_path / "b", blob_url=str(files))
    record, _ = winner.register(Registration("n"), make_folder(tmp_path / "f"))
    with pytest.raises(StorageFailed, match="belong to another registry"):
        loser.sweep()
    with winner.acquire("n") as lease:
        assert Path(lease.manifest.path).exists()
        assert lease.record.id == record.id
    winner.close()
    loser.close()


# ---- PostgreSQL ------------------------------------------------------------------------------


def test_what_one_server_registers_another_serves(open_replica, folders):
    first, second = open_replica("a"), open_replica("b")
    names = ["b", "a/x", "a", "B", "a-1", "a.1"]
    for name in names:
        first.register(Registration(name, settings={"ttl_s": 60}), folders[0])
    assert [record.name for record in second.list()] == sorted(names)
    assert [record.name for record in second.list(limit=2, after="a")] == ["a-1", "a.1"]
    with second.acquire("a/x") as lease:
        assert read_adapter_file(Path(lease.manifest.path)).lora
    assert second.get("B").settings.ttl_s == 60
    assert second.report(second.get("a"))
    second.delete("a/x")
    with pytest.raises(AdapterNotFound):
        first.acquire("a/x")


def test_versions_and_their_rules_are_the_same_there(open_replica, folders):
    first, second = open_replica("a", keep_versions=2), open_replica("b", keep_versions=2)
    one, _ = first.register(Registration("a"), folders[0])
    with pytest.raises(AdapterNameTaken):
        second.register(Registration("a"), folders[1])
    two, _ = second.register(Registration("a", replace=True, expected_id=one.id), folders[1])
    with pytest.raises(VersionConflict):
        first.register(Registration("a", replace=True, expected_id=one.id), folders[2])
    assert first.rollback("a", version=1).id == one.id
    assert second.get("a").id == one.id
    first.register(Registration("a", replace=True), folders[2])
    assert [v.version for v in second.versions("a")] == [3, 1]
    with pytest.raises(AdapterNotFound):
        second.get(f"a@{two.id}")
    assert second.change("a", {"pinned": True}).settings.pinned
    assert [record.name for record in first.pinned()] == ["a"]


def test_of_two_servers_that_register_a_name_at_once_one_wins(open_replica, folders):
    catalogs = [open_replica(name) for name in "ab"]
    for round_index in range(6):
        name, outcomes = f"n{round_index}", []

        def register(catalog, folder, name=name, outcomes=outcomes):
            try:
                outcomes.append(catalog.register(Registration(name), folder)[0].id)
            except AdapterNameTaken:
                outcomes.append(None)

        threads = [
            threading.Thread(target=register, args=pair)
            for pair in zip(catalogs, folders[:2], strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outcomes) == 2
        (winner,) = [outcome for outcome in outcomes if outcome]
        assert {catalog.get(name).id for catalog in catalogs} == {winner}


def test_content_that_another_server_names_at_this_moment_is_not_dropped(open_replica, folders):
    first, second = open_replica("a"), open_replica("b")
    record, _ = first.register(Registration("n"), folders[0])
    registry = second._store._registry
    row = second.get("n")
    stored = StoredAdapter(row.id, row.spec, row.size_bytes, row.native_bytes, None)
    new = NewVersion("m", stored, row.base_model, row.created, "upload", "[]")
    with ThreadPoolExecutor(1) as threads:
        with second.database.begin() as connection:  # as registering does, half-way
            registry.lock(connection, "m")
            registry.add_version(connection, new)
            deleting = threads.submit(first.delete, "n")
            wait_for_lock(first)
        deleting.result(60)
    assert second.get("m").id == record.id
    with pytest.raises(AdapterNotFound):
        second.get("n")


def test_servers_that_swap_contents_of_names_at_once_all_succeed(open_replica, folders):
    catalogs = [open_replica(name, keep_versions=1) for name in "ab"]

    def swap(index: int) -> None:
        for step in range(12):
            wish = Registration("nm"[index], replace=True)
            catalogs[index].register(wish, folders[(index + step) % 2])

    with ThreadPoolExecutor(2) as threads:
        for swapping in [threads.submit(swap, index) for index in range(2)]:
            swapping.result(120)
    with catalogs[0].acquire("n") as one, catalogs[0].acquire("m") as other:
        assert one.record.id != other.record.id


def test_a_version_that_was_deleted_and_given_anew_is_not_rolled_back_to(open_replica, folders):
    first, second = open_replica("a"), open_replica("b")
    first.register(Registration("n"), folders[0])
    found = second._store.version("n", 1)
    first.delete("n")
    for folder in folders[1:]:
        first.register(Registration("n", replace=True), folder)
    with pytest.raises(AdapterNotFound):
        second._store.set_current("n", found, 1_700_000_000, Actor())
    assert second.get("n").version == 2


def test_owners_readers_and_limits_hold_on_all_servers(open_replica, folders):
    first, second = open_replica("a"), open_replica("b")
    limits = OwnerLimits(max_adapters=2)
    owned = {"owner": "acme", "limits": limits, "is_owners": True}
    first.register(Registration("acme/a", **owned), folders[0])
    second.register(Registration("b"), folders[1])
    assert (second.get("acme/a").owner, second.get("acme/a").readers) == ("acme", ())
    lists = {who: [r.name for r in first.list(reader=who)] for who in ("acme", "zeta", "ACME")}
    assert lists == {"acme": ["acme/a", "b"], "zeta": ["b"], "ACME": ["b"]}
    second.change("acme/a", {"readers": ("zeta",)})
    assert [record.name for record in first.list(reader="zeta")] == ["acme/a", "b"]
    assert [record.name for record in first.list(reader="zet")] == ["b"]
    with pytest.raises(AdapterNotOwned):
        second.register(Registration("b", replace=True, **owned), folders[2])
    outcomes = []

    def register(catalog, name):
        try:
            outcomes.append(catalog.register(Registration(name, **owned), folders[0])[0].name)
        except OwnerHasEnough:
            outcomes.append(None)

    pairs = [(catalog, f"acme/{i}") for i, catalog in enumerate((first, second))]
    threads = [threading.Thread(target=register, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(outcome is None for outcome in outcomes) == [False, True]
    with first.database.connect() as connection:
        found = read_audit(connection, limit=9, tenant="acme")
    actions = [entry.action.partition(".")[2] for entry in reversed(found)]
    assert actions == ["create", "change", "create"]


def test_a_registry_of_schema_3_is_brought_to_today_with_its_names(open_replica, folders):
    old = open_replica("a")
    record, _ = old.register(Registration("acme/a", settings={"ttl_s": 60}), folders[0])
    undo = """
        DROP TABLE api_keys, key_changes, usage, usage_writers, audit, name_changes;
        DROP FUNCTION loraplex_refuse_audit_change;
        DROP INDEX names_owned;
        ALTER TABLE names DROP COLUMN owner, DROP COLUMN readers;
        UPDATE schema_version SET version = 3;
    """
    with old.database.begin() as connection:
        connection.exec_driver_sql(undo)
    new = open_replica("b")
    found = new.get("acme/a")
    assert (found.id, found.version, found.settings.ttl_s) == (record.id, 1, 60)
    assert (found.owner, found.readers) == ("", ("*",))
    assert new.register(Registration("acme/a"), folders[0])[1] is False
    assert new.change("acme/a", {"readers": ("x",)}).readers == ("x",)
    with new.database.connect() as connection:
        assert [entry.action for entry in read_audit(connection, limit=9)] == ["adapter.change"]
    with pytest.raises(sqlalchemy.exc.DBAPIError, match="append-only"), new.database.begin() as c:
        c.exec_driver_sql("DELETE FROM audit")
    open_replica("c")  # which finds it as it is to be


def test_a_registry_of_schema_4_goes_on_and_its_changes_are_followed(open_replica, folders):
    old = open_replica("a")
    old.register(Registration("a"), folders[0])
    with old.database.begin() as connection:
        connection.exec_driver_sql("DROP TABLE name_changes; UPDATE schema_version SET version = 4")
    first, second = open_replica("b"), open_replica("c")
    second.changes.catch_up()
    first.delete("a")
    assert [change.name for change in second.changes.catch_up()] == ["a"]


def test_files_outlast_their_names_for_whoever_still_reads_them(open_replica, folders, tmp_path):
    first, second = open_replica("a"), open_replica("b")
    record, _ = first.register(Registration("a"), folders[0])
    file = tmp_path / "blobs" / f"{record.id.removeprefix('sha256:')}.safetensors"
    with second.acquire("a") as lease:
        first.delete("a")
        assert Path(lease.manifest.path).exists()
    second.sweep()
    assert file.exists()
    age(file, SHARED_GRACE_S + 60)
    second.sweep()
    assert not file.exists()


def test_nothing_is_swept_while_the_registry_is_one_that_was_made_anew(tmp_path, folders):
    """By another server's start, as a rule, before a backup is restored into it."""
    shared = {"registry_url": f"sqlite:///{tmp_path / 'registry'}", "blob_url": str(tmp_path / "b")}
    catalog = make_catalog(tmp_path / "data", **shared)
    catalog.register(Registration("a"), folders[0])
    (file,) = (tmp_path / "b").glob("*.safetensors")
    age(file, SHARED_GRACE_S + 60)
    with catalog.database.begin() as connection:
        for table in ("versions", "names", "adapters"):
            connection.exec_driver_sql(f"DELETE FROM {table}")
        connection.exec_driver_sql("UPDATE registry_identity SET id = 'another'")
    with pytest.raises(StorageFailed, match="restore its database, or restart the server"):
        catalog.sweep()
    assert file.exists()
    catalog.close()


def age(file: Path, seconds: float) -> None:
    then = file.stat().st_mtime - seconds
    os.utime(file, (then, then))


def test_a_database_that_isolates_more_by_default_is_asked_for_less(postgres, open_replica):
    """Two servers that register at once would fail by turns: ids of changes follow the commits."""
    engine = sqlalchemy.create_engine(postgres, isolation_level="AUTOCOMMIT")
    setting = f'ALTER DATABASE "{engine.url.database}" {{}} default_transaction_isolation {{}}'
    with engine.connect() as connection:
        connection.exec_driver_sql(setting.format("SET", "= 'repeatable read'"))
    try:
        with open_replica("a").database.connect() as connection:
            found = connection.exec_driver_sql("SHOW transaction_isolation").scalar_one()
    finally:
        with engine.connect() as connection:
            connection.exec_driver_sql(setting.format("RESET", ""))
        engine.dispose()
    assert found == "read committed"
