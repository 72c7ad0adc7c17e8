"""Two servers over one database: what one changes, the other knows within two seconds.

Two seconds are promised on machines that are not full; here others may compute at the same time.
"""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from loraplex_server.adapters.audit_log import Actor
from loraplex_server.adapters.errors import StorageFailed
from loraplex_server.tenants.api_key import KeyWish, digest_of
from loraplex_server.tenants.key_ring import STALE_S, KeyRing
from loraplex_server.tenants.key_store import KeyStore
from loraplex_server.tenants.principal import SETTING_KEY_ID, Role

ADMIN = KeyWish("root", Role.ADMIN)
_PATIENCE_S = 30.0


def test_a_change_elsewhere_is_seen_in_time_and_ones_own_at_once(open_one):
    here, there = KeyStore(open_one()), KeyStore(open_one())

    async def run() -> None:
        ring, other = KeyRing(here), KeyRing(there)
        assert not await ring.is_on()
        assert not await other.is_on()
        key, secret = await asyncio.to_thread(here.create, ADMIN, Actor())
        await ring.refresh()
        assert await ring.find(secret) == key
        await seen(lambda: other.find(secret), wanted=key)
        assert await other.is_on()
        await asyncio.to_thread(there.revoke, key.key_id, Actor())
        await other.refresh()
        assert await other.find(secret) is None
        await seen(lambda: ring.find(secret), wanted=None)
        assert await ring.is_on()

    asyncio.run(run())


async def seen(find, wanted) -> None:
    """Ask as often as requests come, until the answer changes."""
    deadline = time.monotonic() + _PATIENCE_S
    while await find() != wanted:
        assert time.monotonic() < deadline, "a change of keys was not seen"
        await asyncio.sleep(0.01)


def test_after_a_silence_the_very_next_request_knows(open_one):
    here, there = KeyStore(open_one()), KeyStore(open_one())

    async def run() -> None:
        ring = KeyRing(here)
        key, secret = await asyncio.to_thread(there.create, ADMIN, Actor())
        assert await ring.find(secret) == key
        await asyncio.to_thread(there.revoke, key.key_id, Actor())
        ring._read_s -= STALE_S  # the silence
        assert await ring.find(secret) is None

    asyncio.run(run())


def test_what_is_too_old_decides_nothing_when_the_database_is_gone(tmp_path, open_one):
    engine = open_one()
    store = KeyStore(engine)

    async def run() -> None:
        ring = KeyRing(store, "of-the-settings")
        _, secret = await asyncio.to_thread(store.create, ADMIN, Actor())
        assert await ring.find(secret)
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE key_changes RENAME TO key_changes_gone")
        try:
            assert await ring.find(secret)  # what is known is fresh enough
            ring._read_s -= STALE_S
            with pytest.raises(StorageFailed):
                await ring.find(secret)
            assert (await ring.find("of-the-settings")).key_id == SETTING_KEY_ID
        finally:
            with engine.begin() as connection:
                connection.exec_driver_sql("ALTER TABLE key_changes_gone RENAME TO key_changes")
        assert await ring.find(secret)

    asyncio.run(run())


def test_in_an_outage_known_keys_go_on_for_as_long_as_is_allowed(open_one):
    engine = open_one()
    store = KeyStore(engine)

    async def run() -> None:
        ring = KeyRing(store, outage_s=60)
        _, secret = await asyncio.to_thread(store.create, ADMIN, Actor())
        assert await ring.find(secret)
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE key_changes RENAME TO key_changes_gone")
        try:
            ring._read_s -= STALE_S
            assert await ring.find(secret)
            assert await ring.find("unknown") is None
            ring._read_s -= 60
            with pytest.raises(StorageFailed):
                await ring.find(secret)
            with pytest.raises(StorageFailed):  # nothing is known that could go on
                await KeyRing(store, outage_s=60).find(secret)
        finally:
            with engine.begin() as connection:
                connection.exec_driver_sql("ALTER TABLE key_changes_gone RENAME TO key_changes")
        assert await ring.find(secret)

    asyncio.run(run())


class FrozenStore(KeyStore):
    """Reads once; then it answers nothing before it is told to."""

    def __init__(self, engine) -> None:
        super().__init__(engine)
        self.may_read = threading.Event()
        self.may_read.set()

    def num_changes(self) -> int:
        assert self.may_read.wait(60)
        return super().num_changes()


def test_keys_go_on_where_the_database_is_frozen(open_one):
    store = FrozenStore(open_one())
    _, secret = store.create(ADMIN, Actor())

    async def run() -> None:
        ring = KeyRing(store, outage_s=60)
        assert await ring.find(secret)
        store.may_read.clear()
        ring._read_s -= STALE_S
        try:
            async with asyncio.timeout(30):
                assert await ring.find(secret)
        finally:
            store.may_read.set()
        await ring.refresh()
        assert await ring.find(secret)

    asyncio.run(run())


def test_after_an_outage_keys_of_a_restored_database_are_read_whatever_their_count(open_one):
    engine = open_one()
    store = KeyStore(engine)

    async def run() -> None:
        ring = KeyRing(store, outage_s=60)
        _, old = await asyncio.to_thread(store.create, ADMIN, Actor())
        _, lost = await asyncio.to_thread(store.create, ADMIN, Actor())
        assert await ring.find(lost)
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE key_changes RENAME TO key_changes_gone")
        with pytest.raises(StorageFailed):
            await ring.refresh()
        with engine.begin() as connection:  # of before the second key, and another was made since
            connection.exec_driver_sql("ALTER TABLE key_changes_gone RENAME TO key_changes")
            connection.exec_driver_sql("UPDATE key_changes SET count = 1")
            connection.exec_driver_sql(
                f"DELETE FROM api_keys WHERE secret_sha256 = '{digest_of(lost)}'"
            )
        _, new = await asyncio.to_thread(store.create, ADMIN, Actor())
        await ring.refresh()
        found = [await ring.find(secret) is not None for secret in (old, lost, new)]
        assert found == [True, False, True]

    asyncio.run(run())


def test_keys_are_read_while_all_shared_threads_are_busy(open_one):
    store = KeyStore(open_one())
    _, secret = store.create(ADMIN, Actor())

    async def run() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        is_over = threading.Event()
        busy = asyncio.create_task(asyncio.to_thread(is_over.wait, 60))
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(20):
                assert await KeyRing(store).find(secret)
        finally:
            is_over.set()
            await busy

    asyncio.run(run())


def test_uses_are_written_late_and_not_lost(open_one):
    store = KeyStore(open_one())

    async def run() -> None:
        ring = KeyRing(store, clock=lambda: 77.9)
        key, secret = await asyncio.to_thread(store.create, ADMIN, Actor())
        await ring.find(secret)
        await ring.find("unknown")
        assert ring.last_uses() == {key.key_id: 77}
        assert store.list(limit=1)[0].last_used is None
        await asyncio.to_thread(ring.write_uses)
        assert (ring.last_uses(), store.list(limit=1)[0].last_used) == ({}, 77)

    asyncio.run(run())
