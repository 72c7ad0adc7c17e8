"""Two servers over one database: what one changes, the other knows within two seconds."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from loraplex_server.adapters.audit_log import Actor
from loraplex_server.adapters.errors import StorageFailed
from loraplex_server.tenants.api_key import KeyWish
from loraplex_server.tenants.key_ring import STALE_S, KeyRing
from loraplex_server.tenants.key_store import KeyStore
from loraplex_server.tenants.principal import SETTING_KEY_ID, Role

ADMIN = KeyWish("root", Role.ADMIN)
#: What other servers may take to see a change.
BOUND_S = 2.0


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
    """Ask as often as requests come, and assert that the answer changes within the bound."""
    deadline = time.monotonic() + BOUND_S
    while await find() != wanted:
        assert time.monotonic() < deadline, "a change of keys was not seen in time"
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
