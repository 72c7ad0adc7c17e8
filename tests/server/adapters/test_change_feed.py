"""Several servers over one registry: what one changes, the others follow."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from loraplex_server.adapters.change_feed import ChangeFeed
from loraplex_server.adapters.errors import AdapterNotFound, PinRefused, StorageFailed
from loraplex_server.adapters.known_names import STALE_S
from loraplex_server.adapters.name_changes import KEEP_CHANGES_S, NameChange, note_change
from loraplex_server.adapters.registration import Registration
from tests.server.adapters.conftest import wait_for_lock


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def use(catalog, name: str) -> str:
    """Resolve the name by what the catalogue knows; return the id."""
    for _ in range(10):  # what is known is too old where this thread did not run for a while
        if (lease := catalog.try_acquire(name)) is not None:
            with lease:
                return lease.record.id
        catalog.changes.catch_up()
    raise AssertionError(f"{name} is not known")


def warm_up(catalog, *names: str) -> None:
    catalog.changes.catch_up()
    for name in names:
        catalog.acquire(name).release()


def test_a_known_name_needs_no_database_and_follows_changes_elsewhere(open_replica, folders):
    discarded = []
    first, second = open_replica("a"), open_replica("b", on_discard=discarded.append)
    one, _ = first.register(Registration("n"), folders[0])
    first.register(Registration("m"), folders[1])
    warm_up(second, "n", "m")
    with second.database.connect() as connection:  # whoever asks it now waits
        connection.exec_driver_sql("LOCK TABLE names, versions, adapters")
        assert use(second, "n") == one.id
    two, _ = first.register(Registration("n", replace=True), folders[2])
    (change,) = second.changes.catch_up()
    assert (change.name, change.removed, change.gone) == ("n", frozenset(), frozenset())
    assert second.try_acquire("n") is None
    with second.acquire("n") as lease:
        assert lease.record.id == two.id
    first.rollback("n", version=1)
    first.change("n", {"ttl_s": 60, "readers": ("x",)})
    second.changes.catch_up()
    with second.acquire("n") as lease:
        assert (lease.record.id, lease.record.readers) == (one.id, ("x",))
    first.delete("n")
    assert discarded == []
    (change,) = second.changes.catch_up()
    assert change.removed == change.gone == {one.id, two.id}
    assert sorted(discarded) == sorted([one.id, two.id])
    with pytest.raises(AdapterNotFound):
        second.acquire("n")
    assert use(second, "m")


def test_a_delete_is_seen_at_once_where_it_is_made(open_replica, folders):
    (catalog,) = (open_replica("a"),)
    catalog.register(Registration("n"), folders[0])
    warm_up(catalog, "n")
    assert use(catalog, "n")
    catalog.delete("n")
    assert catalog.try_acquire("n") is None
    with pytest.raises(AdapterNotFound):
        catalog.acquire("n")
    catalog.register(Registration("n"), folders[1])
    with catalog.acquire("n") as lease:
        assert lease.record.version == 1


def test_a_name_that_was_not_there_is_found_as_soon_as_it_is_asked_for_anew(
    open_replica, folders, monkeypatch
):
    first, second = open_replica("a"), open_replica("b")
    # What is known does not grow old, however long registering takes.
    now_s = time.monotonic()
    monkeypatch.setattr(second._store.in_use._known, "_clock", lambda: now_s)
    second.changes.catch_up()
    with pytest.raises(AdapterNotFound):
        second.acquire("n")
    first.register(Registration("n"), folders[0])
    with pytest.raises(AdapterNotFound):  # which a second reading of the name relies on
        second.try_acquire("n")
    with second.acquire("n", is_fresh=True) as lease:
        assert lease.record.name == "n"


def test_who_uses_what_was_deleted_elsewhere_goes_on_and_frees_it_at_the_end(open_replica, folders):
    discarded = []
    first, second = open_replica("a"), open_replica("b", on_discard=discarded.append)
    record, _ = first.register(Registration("n"), folders[0])
    second.changes.catch_up()
    lease = second.acquire("n")
    first.delete("n", cancels=True)
    (change,) = second.changes.catch_up()
    assert change.cancels
    assert discarded == []
    assert second.num_held_by(record.id, "n") == 1
    lease.release()
    assert discarded == [record.id]


def test_what_came_back_before_it_was_followed_is_kept(open_replica, folders):
    discarded = []
    first, second = open_replica("a"), open_replica("b", on_discard=discarded.append)
    record, _ = first.register(Registration("n"), folders[0])
    warm_up(second, "n")
    first.delete("n")
    first.register(Registration("again"), folders[0])
    second.changes.catch_up()
    assert discarded == []
    with second.acquire("again") as lease:
        assert lease.record.id == record.id


def test_who_was_cut_off_for_longer_than_changes_are_kept_misses_nothing(open_replica, folders):
    clock, discarded = Clock(), []
    first = open_replica("a", clock=clock)
    second = open_replica("b", on_discard=discarded.append)
    gone, _ = first.register(Registration("n"), folders[0])
    stays, _ = first.register(Registration("m"), folders[1])
    warm_up(second, "n", "m")
    first.delete("n")
    first.change("m", {"ttl_s": 10**6})
    clock.now += KEEP_CHANGES_S + 1
    first.change("m", {"ttl_s": 10**7})
    first.sweep()
    assert second.changes.catch_up() is None
    assert discarded == [gone.id]
    with second.acquire("m") as lease:
        assert (lease.record.id, lease.record.settings.ttl_s) == (stays.id, 10**7)
    first.change("m", {"ttl_s": 60})
    assert [change.name for change in second.changes.catch_up()] == ["m"]


def test_a_change_by_a_server_whose_clock_is_behind_is_not_lost_in_between(open_replica, folders):
    clock, late = Clock(), Clock()
    late.now -= 2 * KEEP_CHANGES_S
    first, slow = open_replica("a", clock=clock), open_replica("b", clock=late)
    second = open_replica("c")
    for index, name in enumerate("nm"):
        first.register(Registration(name), folders[index])
    warm_up(second, "n", "m")
    first.change("m", {"ttl_s": 10**6})
    slow.change("n", {"readers": ("x",)})
    first.change("m", {"ttl_s": 10**7})
    first.sweep()  # takes what is old by its clock: the row in the middle
    second.changes.catch_up()
    with second.acquire("n") as lease:
        assert lease.record.readers == ("x",)


def test_any_number_of_adapters_that_went_at_once_can_be_followed(open_replica, folders):
    discarded = []
    first, second = open_replica("a"), open_replica("b", on_discard=discarded.append)
    record, _ = first.register(Registration("n"), folders[0])
    stays, _ = first.register(Registration("m"), folders[1])
    warm_up(second, "n", "m")
    # More than a statement of PostgreSQL takes, 65,535; as after a long outage.
    many = frozenset(f"sha256:{number:064x}" for number in range(70_000)) | {stays.id}
    with first.database.begin() as connection:
        note_change(connection, NameChange(first.scope, "others", gone=many), int(time.time()))
    first.delete("n")
    assert len(second.changes.catch_up()) == 2
    assert discarded == [record.id]


def test_a_registry_restored_from_a_backup_is_looked_up_anew(open_replica, folders):
    first, second = open_replica("a"), open_replica("b")
    for index, folder in enumerate(folders):
        first.register(Registration(f"n{index}"), folder)
    warm_up(second, "n0", "n1")
    with first.database.begin() as connection:
        connection.exec_driver_sql("DELETE FROM versions WHERE name = 'n1'")
        connection.exec_driver_sql("DELETE FROM names WHERE name = 'n1'")
        connection.exec_driver_sql("DELETE FROM name_changes WHERE id > 1")
    assert second.changes.catch_up() is None
    with pytest.raises(AdapterNotFound):
        second.acquire("n1")


def test_changes_made_at_once_are_all_followed_in_one_order(open_replica, folders):
    catalogs = [open_replica(name) for name in "abc"]
    watchers = [open_replica(f"w{index}") for index in range(2)]
    catalogs[0].register(Registration("n"), folders[0])
    seen: list[list] = [list(watcher.changes.catch_up()) for watcher in watchers]
    is_over = threading.Event()

    def watch(index: int) -> None:
        while not is_over.is_set():
            seen[index] += watchers[index].changes.catch_up()
        seen[index] += watchers[index].changes.catch_up()

    def change(catalog, number: int) -> None:
        for step in range(10):
            catalog.register(Registration(f"n{number}-{step}"), folders[number])

    threads = [threading.Thread(target=watch, args=(index,)) for index in range(2)]
    workers = [
        threading.Thread(target=change, args=pair) for pair in zip(catalogs, range(3), strict=True)
    ]
    for thread in threads + workers:
        thread.start()
    for thread in workers:
        thread.join(timeout=120)
    is_over.set()
    for thread in threads:
        thread.join(timeout=120)
    for found in seen:
        ids = [change.change_id for change in found]
        assert ids == list(range(ids[0], ids[0] + len(ids)))
        assert len({change.name for change in found} - {"n"}) == 30


def test_in_an_outage_known_names_resolve_and_others_say_why_not(open_replica, folders):
    patient, strict = open_replica("a", outage_s=60), open_replica("b")
    patient.register(Registration("n"), folders[0])
    for catalog in (patient, strict):
        warm_up(catalog, "n")
    with patient.database.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE names RENAME TO names_gone")
        connection.exec_driver_sql("ALTER TABLE name_changes RENAME TO name_changes_gone")
    for catalog in (patient, strict):
        with pytest.raises(StorageFailed):
            catalog.changes.catch_up()
    time.sleep(STALE_S + 0.1)
    assert use(patient, "n")
    with patient.acquire("n") as lease:
        assert lease.record.name == "n"
    for catalog, name in ((patient, "m"), (strict, "n")):
        with pytest.raises(StorageFailed, match="database"):
            catalog.acquire(name)
    with patient.database.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE names_gone RENAME TO names")
        connection.exec_driver_sql("ALTER TABLE name_changes_gone RENAME TO name_changes")
    for catalog in (patient, strict):
        warm_up(catalog, "n")
        assert use(catalog, "n")


def test_the_age_of_what_is_known_is_the_time_since_it_was_last_followed(open_replica):
    clock, catalog = Clock(), open_replica("a")
    feed = ChangeFeed(catalog.database, catalog.scope, catalog._store.in_use, clock=clock)
    clock.now += 5
    assert feed.age_s == 5
    feed.catch_up()
    assert feed.age_s == 0
    with catalog.database.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE name_changes RENAME TO name_changes_gone")
    clock.now += 7
    with pytest.raises(StorageFailed):
        feed.catch_up()
    assert feed.age_s == 7
    with catalog.database.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE name_changes_gone RENAME TO name_changes")
    feed.catch_up()
    assert feed.age_s == 0


def test_what_another_server_uses_does_not_expire_as_unused(open_replica, folders):
    clock = Clock()
    first, second = open_replica("a", clock=clock), open_replica("b", clock=clock)
    first.register(Registration("n", settings={"ttl_s": 60}), folders[0])
    first.register(Registration("m", settings={"ttl_s": 60}), folders[1])
    clock.now += 59
    second.acquire("n").release()  # not in the registry yet
    clock.now += 2
    assert first.delete_expired() == ()
    second.write_uses()  # as it does twice a minute
    clock.now += 90
    assert [removal.record.name for removal in first.delete_expired()] == ["m"]
    clock.now += 60
    removed = [catalog.delete_expired() for catalog in (first, second)]
    assert [len(removals) for removals in removed] == [1, 0]


def test_what_a_server_uses_while_it_is_cut_off_does_not_expire(open_replica, folders):
    clock = Clock()
    first, second = (open_replica(name, clock=clock, outage_s=600) for name in "ab")
    for name, folder in zip("nm", folders, strict=False):
        first.register(Registration(name, settings={"ttl_s": 60}), folder)
    clock.now += 600  # as long as the other may go on with what it knows
    second.acquire("n").release()
    clock.now += 90
    assert first.delete_expired() == ()
    second.write_uses()  # the registry answers it again
    clock.now += 60
    assert [removal.record.name for removal in first.delete_expired()] == ["m"]


def test_a_use_that_is_being_written_down_keeps_a_name_from_expiring(open_replica, folders):
    clock = Clock()
    first = open_replica("a", clock=clock)
    first.register(Registration("n", settings={"ttl_s": 60}), folders[0])
    clock.now += 1000
    with ThreadPoolExecutor(1) as threads:
        with first.database.begin() as connection:  # another server, half-way
            connection.exec_driver_sql(f"UPDATE names SET active = {int(clock.now)}")
            expiring = threads.submit(first.delete_expired)
            wait_for_lock(first)
        assert expiring.result(60) == ()
    assert first.get("n").name == "n"


def test_pins_of_two_servers_at_once_stay_within_their_share(open_replica, folders):
    catalogs = [open_replica(name) for name in "ab"]
    for index in range(2):
        catalogs[0].register(Registration(f"n{index}"), folders[index])
    max_pages = catalogs[0].get("n0").pool_pages
    outcomes = []

    def pin(catalog, name: str) -> None:
        try:
            catalog.change(name, {"pinned": True}, max_pinned_pages=max_pages)
            outcomes.append(True)
        except PinRefused:
            outcomes.append(False)

    threads = [
        threading.Thread(target=pin, args=pair) for pair in zip(catalogs, ("n0", "n1"), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(outcomes) == [False, True]


def test_copies_of_what_was_deleted_while_a_server_was_down_go_at_its_start(
    open_replica, folders, tmp_path
):
    url = "memory://fleet-copies"
    first = open_replica("a", blob_url=url)
    record, _ = first.register(Registration("n"), folders[0])
    kept, _ = first.register(Registration("m"), folders[1])
    second = open_replica("b", blob_url=url)
    warm_up(second, "n", "m")
    copies = tmp_path / "b" / "cache"
    assert {f"sha256:{path.stem}" for path in copies.iterdir()} == {record.id, kept.id}
    second.close()
    (copies / "half.part").write_bytes(b"half")
    first.delete("n")
    third = open_replica("b", blob_url=url)
    assert [f"sha256:{path.stem}" for path in copies.iterdir()] == [kept.id]
    warm_up(third, "m")
    first.delete("m")
    third.changes.catch_up()
    assert list(copies.iterdir()) == []
