"""Names as aliases to versions, in the catalogue."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from loraplex_server.adapters.blobs import BlobStore
from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.defaults import AdapterDefaults
from loraplex_server.adapters.errors import (
    AdapterNameTaken,
    AdapterNotFound,
    AmbiguousVersion,
    InvalidAdapterName,
    PinRefused,
    StorageFailed,
    VersionConflict,
    VersionIsCurrent,
)
from loraplex_server.adapters.registration import Registration
from loraplex_server.adapters.registry import Registry
from tests.support.adapters import make_catalog, make_folder


class Clock:
    def __init__(self):
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def catalog(tmp_path: Path, clock: Clock) -> Iterator[AdapterCatalog]:
    catalog = make_catalog(tmp_path / "data", clock=clock, keep_versions=3)
    yield catalog
    catalog.close()


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [make_folder(tmp_path / str(seed), seed=seed) for seed in range(5)]


def put(catalog, folder, name="a", **options):
    return catalog.register(Registration(name, replace=True, **options), folder)[0]


def blobs(tmp_path: Path) -> set[str]:
    return {f"sha256:{path.stem}" for path in (tmp_path / "data" / "blobs").iterdir()}


def test_old_versions_go_beyond_those_to_keep(catalog, folders, tmp_path):
    records = [put(catalog, folder) for folder in folders]
    assert [r.version for r in catalog.versions("a")] == [5, 4, 3]
    assert blobs(tmp_path) == {r.id for r in records[2:]}


def test_the_current_version_stays_however_old_it_is(catalog, folders):
    first = put(catalog, folders[0])
    put(catalog, folders[1])
    catalog.rollback("a", version=1)
    for folder in folders[2:]:
        put(catalog, folder)
        catalog.rollback("a", adapter_id=first.id)
    assert catalog.get("a").id == first.id
    assert [r.version for r in catalog.versions("a")] == [5, 4, 1]


def test_content_that_was_a_version_before_becomes_current_again(catalog, folders):
    first = put(catalog, folders[0])
    put(catalog, folders[1])
    again, is_new = catalog.register(Registration("a", replace=True), folders[0])
    assert is_new
    assert (again.version, again.id) == (1, first.id)
    assert len(catalog.versions("a")) == 2


def test_without_replace_or_with_a_wrong_expectation_nothing_changes(catalog, folders):
    first = put(catalog, folders[0])
    with pytest.raises(AdapterNameTaken) as taken:
        catalog.register(Registration("a"), folders[1])
    assert taken.value.details == {"current_id": first.id}
    with pytest.raises(VersionConflict):
        put(catalog, folders[1], expected_id="sha256:" + "0" * 64)
    with pytest.raises(VersionConflict) as conflict:
        put(catalog, folders[1], name="nobody", expected_id=first.id)
    assert conflict.value.details == {"current_id": None}
    assert put(catalog, folders[1], expected_id=first.id).version == 2


def test_two_names_share_a_version_and_each_lets_go_alone(catalog, folders, tmp_path):
    first = put(catalog, folders[0])
    put(catalog, folders[0], name="b")
    put(catalog, folders[1])
    catalog.delete(f"a@{first.id}")
    assert first.id in blobs(tmp_path)
    catalog.delete("b")
    assert first.id not in blobs(tmp_path)


def test_references_are_exact(catalog, folders):
    ids = [put(catalog, folder).id for folder in folders[:2]]
    assert catalog.get(f"a@{ids[0]}").id == ids[0]
    assert catalog.get(f"a@{ids[0][:19]}").id == ids[0]
    for reference in ("a@", "a@sha256:", f"a@{ids[0][:18]}", f"a@{ids[0]}0", "a@md5:" + "0" * 32):
        with pytest.raises(InvalidAdapterName):
            catalog.get(reference)
    with pytest.raises(AdapterNotFound):
        catalog.get("a@sha256:" + "0" * 12)
    with pytest.raises(AdapterNotFound):
        catalog.get(f"b@{ids[0]}")
    with pytest.raises(VersionIsCurrent):
        catalog.delete(f"a@{ids[1]}")


def test_a_prefix_of_two_versions_is_refused(catalog, folders, monkeypatch):
    alike = iter(["sha256:" + "a" * 20 + digit * 44 for digit in "bc"])
    monkeypatch.setattr("loraplex_server.adapters.checks.adapter_id", lambda _: next(alike))
    put(catalog, folders[0])
    put(catalog, folders[1])
    with pytest.raises(AmbiguousVersion):
        catalog.get("a@sha256:" + "a" * 20)
    assert catalog.get("a@sha256:" + "a" * 20 + "b").version == 1


def test_a_lease_keeps_its_version_while_the_name_moves_on(catalog, folders, tmp_path):
    with catalog.acquire("a") if put(catalog, folders[0]) else None as lease:
        for folder in folders[1:]:
            put(catalog, folder)
        assert lease.record.version == 1
        assert Path(lease.manifest.path).exists()
    assert not Path(lease.manifest.path).exists()


def test_a_delete_ends_when_the_last_user_lets_go(catalog, folders):
    put(catalog, folders[0])
    lease = catalog.acquire("a")
    (drain,) = catalog.delete("a").drains
    assert not drain.freed.done()
    assert catalog.num_waited_for(drain) == 1
    lease.release()
    assert drain.freed.result(0) == lease.record.size_bytes


def test_a_delete_does_not_wait_for_users_of_another_name(catalog, folders):
    put(catalog, folders[0])
    put(catalog, folders[0], name="b")
    own, others = catalog.acquire("a"), catalog.acquire("b")
    (drain,) = catalog.delete("a").drains
    assert not drain.freed.done()
    own.release()
    assert drain.freed.result(0) == 0
    others.release()


def test_a_delete_ends_when_the_content_is_registered_again(catalog, folders):
    put(catalog, folders[0])
    lease = catalog.acquire("a")
    (drain,) = catalog.delete("a").drains
    put(catalog, folders[0], name="b")
    assert not drain.freed.done()
    lease.release()
    assert drain.freed.result(0) == 0
    assert catalog.get("b").id == lease.record.id


def test_settings_belong_to_the_name_and_survive(catalog, folders, tmp_path, clock):
    defaults = AdapterDefaults.model_validate({"generation": {"stop": "x"}, "max_context": 5})
    put(catalog, folders[0], settings={"ttl_s": 60, "defaults": defaults})
    catalog.change("a", {"pinned": True})
    put(catalog, folders[1])
    catalog.close()
    again = make_catalog(tmp_path / "data", clock=clock)
    settings = again.get("a").settings
    assert (settings.pinned, settings.ttl_s, settings.defaults) == (True, 60, defaults)
    assert [record.name for record in again.pinned()] == ["a"]
    again.close()


def test_pins_count_each_content_once(catalog, folders):
    pages = put(catalog, folders[0]).pool_pages
    put(catalog, folders[0], name="b")
    put(catalog, folders[1], name="c")
    catalog.change("a", {"pinned": True}, max_pinned_pages=pages)
    catalog.change("b", {"pinned": True}, max_pinned_pages=pages)
    with pytest.raises(PinRefused):
        catalog.change("c", {"pinned": True}, max_pinned_pages=pages)
    assert not catalog.get("c").settings.pinned


def test_names_expire_by_their_last_use(catalog, folders, clock):
    for name in ("used", "idle", "pinned", "leased", "kept"):
        put(catalog, folders[0], name=name, settings={"ttl_s": 100} if name != "kept" else {})
    catalog.change("pinned", {"pinned": True})
    lease = catalog.acquire("leased")
    clock.now += 90
    catalog.acquire("used").release()
    clock.now += 20
    assert [r.record.name for r in catalog.delete_expired()] == ["idle"]
    clock.now += 100
    assert [r.record.name for r in catalog.delete_expired()] == ["used"]
    lease.release()
    clock.now += 101
    assert [r.record.name for r in catalog.delete_expired()] == ["leased"]
    assert [r.name for r in catalog.list()] == ["kept", "pinned"]


def test_uses_are_written_once_in_a_while_and_at_the_end(catalog, folders, clock, tmp_path):
    put(catalog, folders[0])
    assert catalog.get("a").last_used is None
    clock.now += 5
    catalog.acquire("a").release()
    assert catalog.get("a").last_used == int(clock.now)
    catalog.close()
    again = make_catalog(tmp_path / "data", clock=clock)
    assert again.get("a").last_used == int(clock.now)
    again.close()


def test_a_new_owner_of_a_name_has_not_used_it(catalog, folders):
    put(catalog, folders[0])
    catalog.acquire("a").release()
    catalog.delete("a")
    put(catalog, folders[1])
    assert catalog.get("a").last_used is None


# ---- races, each at the moment where it hurts --------------------------------------------------


def test_what_is_deleted_while_it_is_described_or_changed_is_not_found(
    catalog, folders, monkeypatch
):
    record = put(catalog, folders[0])
    real = Registry.set_settings

    def delete_first(self, connection, name, settings):
        catalog.delete(name)
        real(self, connection, name, settings)

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "set_settings", delete_first)
        with pytest.raises(AdapterNotFound):
            catalog.change("a", {"ttl_s": 5})
    with pytest.raises(AdapterNotFound):
        catalog.report(record)


def test_a_name_that_is_given_again_ends_the_wait_for_its_former_users(catalog, folders):
    record = put(catalog, folders[0])
    former = catalog.acquire("a")
    (drain,) = catalog.delete("a").drains
    put(catalog, folders[0], name="b")
    assert not drain.freed.done()  # another name: those who asked for "a" can be told apart
    put(catalog, folders[0])
    assert drain.freed.result(0) == 0
    with catalog.acquire("a") as again:
        former.release()
        assert again.record.id == record.id
    assert catalog.num_leases(record.id) == 0


def test_who_gave_up_waiting_holds_up_no_release(catalog, folders, tmp_path):
    record = put(catalog, folders[0])
    lease = catalog.acquire("a")
    (drain,) = catalog.delete("a").drains
    drain.freed.cancel()
    lease.release()
    assert record.id not in blobs(tmp_path)


def test_later_uses_are_kept_and_unwritten_ones_too(catalog, folders, clock, monkeypatch):
    put(catalog, folders[0])
    with catalog.acquire("a"):
        pass
    clock.now += 100
    put(catalog, folders[0], settings={"ttl_s": 50})  # the same content, but a sign of life
    broken = OperationalError("UPDATE", {}, OSError("gone"))
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "touch", lambda *a: (_ for _ in ()).throw(broken))
        with pytest.raises(StorageFailed):
            catalog.write_uses()
    assert catalog.get("a").last_used == int(clock.now) - 100
    catalog.write_uses()
    assert catalog.get("a").last_used == int(clock.now) - 100
    clock.now += 49
    assert catalog.delete_expired() == ()
    clock.now += 1
    assert [removal.record.name for removal in catalog.delete_expired()] == ["a"]


def test_a_registration_that_cannot_be_stored_leaves_no_file(
    catalog, folders, tmp_path, monkeypatch
):
    def full(self, adapter_id, file):
        BlobStore._put(self, BlobStore._path(self, adapter_id), file)
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(BlobStore, "put", full)
        with pytest.raises(StorageFailed, match="disk is full"):
            put(catalog, folders[0])
    assert blobs(tmp_path) == set()
    put(catalog, folders[0])
    assert len(blobs(tmp_path)) == 1
