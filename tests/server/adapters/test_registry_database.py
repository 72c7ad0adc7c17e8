"""Registries of earlier releases, of later ones, and on PostgreSQL."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy

from loraplex_memory.adapter_file import read_adapter_file
from loraplex_server.adapters.audit_log import read_audit
from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.errors import (
    AdapterNameTaken,
    AdapterNotFound,
    AdapterNotOwned,
    OwnerHasEnough,
    StorageFailed,
    VersionConflict,
)
from loraplex_server.adapters.registration import OwnerLimits, Registration
from loraplex_server.adapters.store import SHARED_GRACE_S
from tests.support.adapters import make_catalog, make_config, make_folder, make_tensors
from tests.support.old_registries import write_registry_1, write_registry_2
from tests.support.postgres import find_programs, running_postgres


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


# ---- PostgreSQL ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgres(tmp_path_factory) -> Iterator[str]:
    programs = find_programs()
    if programs is None:
        pytest.skip("no PostgreSQL: neither `initdb` in PATH nor in /usr/lib/postgresql/*/bin")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("no driver for PostgreSQL: psycopg is not installed")
    folder = tmp_path_factory.mktemp("postgres")
    for parent in (folder, *list(folder.parents)[:2]):
        parent.chmod(0o755)  # for whoever the server runs as
    with running_postgres(programs, folder) as url:
        yield url


@pytest.fixture
def open_replica(postgres, tmp_path) -> Iterator[Callable[[str], AdapterCatalog]]:
    """Return a function that opens another server's catalogue over the same registry and files."""
    opened = []

    def open_one(name: str, **settings) -> AdapterCatalog:
        catalog = make_catalog(
            tmp_path / name, registry_url=postgres, blob_url=str(tmp_path / "blobs"), **settings
        )
        opened.append(catalog)
        return catalog

    yield open_one
    for catalog in opened:
        catalog.close()
    engine = sqlalchemy.create_engine(postgres.replace("postgresql", "postgresql+psycopg"))
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
    engine.dispose()


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    return [make_folder(tmp_path / f"f{seed}", seed=seed) for seed in range(3)]


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


def test_files_outlast_their_names_for_whoever_still_reads_them(open_replica, folders, tmp_path):
    first, second = open_replica("a"), open_replica("b")
    record, _ = first.register(Registration("a"), folders[0])
    file = tmp_path / "blobs" / f"{record.id.removeprefix('sha256:')}.safetensors"
    with second.acquire("a") as lease:
        first.delete("a")
        assert Path(lease.manifest.path).exists()
    second.sweep_files()
    assert file.exists()
    age(file, SHARED_GRACE_S + 60)
    second.sweep_files()
    assert not file.exists()


def age(file: Path, seconds: float) -> None:
    then = file.stat().st_mtime - seconds
    os.utime(file, (then, then))
