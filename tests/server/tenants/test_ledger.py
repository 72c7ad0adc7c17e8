from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from loraplex_server.adapters.errors import StorageFailed
from loraplex_server.adapters.registry_database import open_database, sqlite_url
from loraplex_server.tenants.errors import InvalidCursor
from loraplex_server.tenants.ledger import UsageLedger
from loraplex_server.tenants.usage_store import Account, Amounts, UsageQuery, UsageStore
from tests.server.tenants import usage_driver

HOUR = 3600
DAY = 24 * HOUR
NOW = 100 * DAY + 5 * HOUR + 7


class Use:
    """A request in flight."""

    def __init__(self, tenant: str = "t", adapter: str = "a") -> None:
        self.tenant, self.adapter = tenant, adapter
        self.amounts = Amounts()

    def used(self) -> Amounts:
        return self.amounts


def report(store: UsageStore, **query) -> list[tuple]:
    rows = store.report(UsageQuery(**query), limit=100)
    return [(row.start, row.tenant, row.adapter, tuple(row.amounts)) for row in rows]


def test_a_batch_counts_once_however_often_it_is_written(open_one):
    store = UsageStore(open_one(), "base")
    used = {Account(NOW // HOUR * HOUR, "t", "a"): Amounts(1, 10, 4, 7)}
    for batch in (1, 1, 2, 1, 2):
        store.add("writer", batch, used, NOW)
    assert report(store) == [(NOW // HOUR * HOUR, "t", "a", (2, 20, 8, 14))]


def test_what_several_servers_write_at_once_adds_up(open_one):
    stores = [UsageStore(open_one(), "base") for _ in range(3)]
    accounts = [Account(0, tenant, adapter) for tenant in "ab" for adapter in ("", "x", "y")]

    def write(index: int) -> None:
        for batch in range(1, 9):
            order = accounts if index % 2 else accounts[::-1]
            used = {account: Amounts(1, 2, 1, 3) for account in order}
            stores[index].add(f"writer{index}", batch, used, NOW)

    threads = [threading.Thread(target=write, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [row[3] for row in report(stores[0])] == [(24, 48, 24, 72)] * len(accounts)


def test_of_one_batch_written_twice_at_once_one_counts(open_one):
    stores = [UsageStore(open_one(), "base") for _ in range(4)]
    used = {Account(0, "t", "a"): Amounts(1, 1, 1, 1)}
    for batch in range(1, 6):
        threads = [
            threading.Thread(target=store.add, args=("writer", batch, used, NOW))
            for store in stores
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert report(stores[0]) == [(0, "t", "a", (5, 5, 5, 5))]


def test_reports_are_by_hour_by_day_or_of_all(open_one):
    store = UsageStore(open_one(), "base")
    hours = (NOW - DAY, NOW, NOW + HOUR)
    for batch, when in enumerate(hours, start=1):
        hour = when // HOUR * HOUR
        accounts = [Account(hour, *whose) for whose in (("t", ""), ("t", "x"), ("u", "x"))]
        used = dict.fromkeys(accounts, Amounts(1, 2, 0, 3))
        store.add("writer", batch, used, NOW)
    UsageStore(open_one(), "another base").add("other", 1, {Account(0, "t", ""): Amounts(9)}, NOW)
    assert len(report(store)) == 9
    assert [row[0] for row in report(store, tenant="u")] == [when // HOUR * HOUR for when in hours]
    days = report(store, bucket_s=DAY, adapters=("",))
    assert days == [(99 * DAY, "t", "", (1, 2, 0, 3)), (100 * DAY, "t", "", (2, 4, 0, 6))]
    (whole,) = store.report(UsageQuery(bucket_s=None, tenant="u"), limit=9)
    assert (whole.start, whole.end) == (hours[0] // HOUR * HOUR, hours[2] // HOUR * HOUR + HOUR)
    assert whole.amounts == (3, 6, 0, 9)
    assert len(report(store, start=NOW, end=NOW + 1)) == 3
    assert len(report(store, start=NOW + HOUR)) == 3


@pytest.mark.parametrize("bucket_s", [HOUR, None])
def test_reports_are_read_page_by_page(open_one, bucket_s):
    store = UsageStore(open_one(), "base")
    accounts = [Account(hour, t, a) for hour in (0, HOUR) for t in "bA" for a in ("", "Z", "a/b")]
    store.add("writer", 1, {account: Amounts(1) for account in accounts}, NOW)
    query = UsageQuery(bucket_s=bucket_s)
    whole = store.report(query, limit=100)
    assert len(whole) == (12 if bucket_s else 6)
    paged, after = [], None
    while page := store.report(query, limit=5, after=after):
        paged += page
        after = page[-1].cursor
    assert paged == whole
    for wrong in ("", "x", "1|a", "-1|a|b", "1|a|b|c"):
        with pytest.raises(InvalidCursor):
            store.report(query, limit=1, after=wrong)


def test_what_runs_is_noted_while_it_runs(open_one):
    store = UsageStore(open_one(), "base")

    async def run() -> None:
        ledger = UsageLedger(store, clock=lambda: NOW)
        use = Use()
        ledger.open(use)
        for generated in (5, 9):
            use.amounts = Amounts(1, 10, 2, generated)
            await ledger.write()
            assert report(store)[0][3] == (1, 10, 2, generated)
        use.amounts = Amounts(1, 10, 2, 12)
        ledger.close(use)
        await ledger.stop()

    asyncio.run(run())
    assert report(store) == [(NOW // HOUR * HOUR, "t", "a", (1, 10, 2, 12))]


def test_a_database_that_fails_for_a_while_loses_nothing(open_one):
    engine = open_one()
    store = UsageStore(engine, "base")

    def rename(old: str, new: str) -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"ALTER TABLE {old} RENAME TO {new}")

    async def run() -> None:
        ledger = UsageLedger(store, clock=lambda: NOW)
        use = Use()
        ledger.open(use)
        use.amounts = Amounts(1, 1, 0, 1)
        rename("usage", "usage_gone")
        for _ in range(2):
            with pytest.raises(StorageFailed):
                await ledger.write()
        use.amounts = Amounts(1, 1, 0, 4)
        rename("usage_gone", "usage")
        ledger.close(use)
        await ledger.stop()

    asyncio.run(run())
    assert report(store) == [(NOW // HOUR * HOUR, "t", "a", (1, 1, 0, 4))]


def test_the_task_that_writes_ends_and_begins_again(open_one, monkeypatch):
    monkeypatch.setattr("loraplex_server.tenants.ledger.WRITE_S", 0.01)
    store = UsageStore(open_one(), "base")

    async def run() -> None:
        ledger = UsageLedger(store, clock=lambda: NOW)
        for total in (1, 2):
            use = Use()
            ledger.open(use)
            use.amounts = Amounts(1)
            ledger.close(use)
            assert ledger._task is not None
            await asyncio.wait_for(ledger._task, timeout=20)
            assert report(store)[0][3][0] == total

    asyncio.run(run())
    assert report(store) == [(NOW // HOUR * HOUR, "t", "a", (2, 0, 0, 0))]


def test_a_kill_loses_at_most_what_was_not_written_and_counts_nothing_twice(tmp_path):
    url = sqlite_url(tmp_path / "usage.sqlite3")
    root = Path(__file__).parents[3]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    booked_in_all, num_kills = 0, 4
    for num_batches in (1, 7, 20, 33):
        process = subprocess.Popen(
            [sys.executable, usage_driver.__file__, url], env=env, text=True, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(num_batches)]
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
        process.wait(timeout=30)
        process.stdout.close()
        booked_in_all += int(lines[-1])
    store = UsageStore(open_database(url, lambda adapter_id: None), "base")
    (row,) = store.report(UsageQuery(bucket_s=None), limit=9)
    # Of each kill, one batch of one token may be in the database whose news was not printed.
    assert booked_in_all <= row.amounts.completion_tokens <= booked_in_all + num_kills
    assert (row.amounts.requests, row.amounts.prompt_tokens) == (num_kills, 3 * num_kills)
