"""What goes on while the store of adapter files hangs."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import fsspec
import httpx
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from loraplex_server.adapters.errors import AdapterNotFound
from loraplex_server.adapters.known_names import STALE_S
from loraplex_server.adapters.registration import Registration
from loraplex_server.api.app import create_app
from loraplex_server.api.services import Services
from loraplex_server.config import Config
from tests.server.api.conftest import BASE, make_adapter, wait_until
from tests.support.adapters import make_catalog
from tests.support.fake_engine import FakeEngine


class StuckStore(MemoryFileSystem):
    """An object store that takes everything, and hands nothing out before it is told to."""

    protocol = "stuck"
    may_read = threading.Event()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("stuck://"))

    def get_file(self, *args, **kwargs) -> None:
        assert self.may_read.wait(60)
        super().get_file(*args, **kwargs)


@pytest.fixture
def open_catalog(tmp_path):
    fsspec.register_implementation("stuck", StuckStore, clobber=True)
    opened = []

    def open_one(name: str, **settings):
        files = f"stuck://{tmp_path.name}/pins"  # as long as the process lives
        shared = {"registry_url": f"sqlite:///{tmp_path / 'registry'}", "blob_url": files}
        opened.append(make_catalog(tmp_path / name, base_name=BASE, **shared, **settings))
        return opened[-1]

    StuckStore.may_read.clear()
    yield open_one
    StuckStore.may_read.set()
    for catalog in opened:
        catalog.close()


def test_changes_are_followed_while_a_pinned_adapter_is_still_fetched(
    open_catalog, tmp_path, vocabulary
):
    here, there = open_catalog("here"), open_catalog("there")
    pinned, _ = there.register(Registration("n"), make_adapter(tmp_path / "n"))
    there.change("n", {"pinned": True})
    engine = FakeEngine()
    config = Config(data_dir=tmp_path / "here", registry_url=f"sqlite:///{tmp_path / 'registry'}")

    async def run() -> None:
        app = create_app(Services(config, engine, here, vocabulary, base_names=(BASE,)))
        there.change("n", {"ttl_s": 60})
        async with asyncio.timeout(30):  # below what the store hangs for
            await app.state.follower.read()
            assert engine.kept == {pinned.id}
            assert engine.prefetched == []
            there.change("n", {"readers": ("x",)})
            await app.state.follower.read()
            await app.state.upkeep.tick()
        StuckStore.may_read.set()

        def is_done() -> bool:
            return bool(engine.prefetched) and not here.num_leases(pinned.id)

        await asyncio.to_thread(wait_until, is_done, 30.0)

    asyncio.run(run())


def test_known_names_go_on_while_the_registry_is_frozen(open_catalog, tmp_path, vocabulary):
    """It breaks no connection, so nothing fails: only nothing comes."""
    here = open_catalog("here", outage_s=60.0)
    StuckStore.may_read.set()
    here.register(Registration("n"), make_adapter(tmp_path / "n"))
    config = Config(data_dir=tmp_path / "here", registry_url=f"sqlite:///{tmp_path / 'registry'}")
    may_answer = threading.Event()
    follow = here.changes._follow

    def answer_late(connection):
        assert may_answer.wait(60)
        return follow(connection)

    async def run() -> None:
        app = create_app(Services(config, FakeEngine(), here, vocabulary, base_names=(BASE,)))
        await app.state.follower.read()
        here.acquire("n").release()
        here.changes._follow = answer_late
        reading = asyncio.create_task(app.state.follower.read())
        await asyncio.sleep(STALE_S)

        def is_known() -> bool:
            if (lease := here.try_acquire("n")) is not None:
                lease.release()
            return lease is not None

        try:
            await asyncio.to_thread(wait_until, is_known, 30.0)
            assert not reading.done()
        finally:
            may_answer.set()
        await reading

    asyncio.run(run())


def test_changes_are_followed_while_pinned_names_cannot_be_read(
    open_catalog, tmp_path, vocabulary, monkeypatch
):
    """Somebody has locked the table of names, and not that of changes."""
    here, there = open_catalog("here", outage_s=60.0), open_catalog("there")
    StuckStore.may_read.set()
    there.register(Registration("n"), make_adapter(tmp_path / "n"))
    config = Config(data_dir=tmp_path / "here", registry_url=f"sqlite:///{tmp_path / 'registry'}")
    may_answer, read_pinned = threading.Event(), here.pinned

    def pinned_late():
        assert may_answer.wait(60)
        return read_pinned()

    monkeypatch.setattr(here, "pinned", pinned_late)

    async def run() -> None:
        engine = FakeEngine()
        app = create_app(Services(config, engine, here, vocabulary, base_names=(BASE,)))
        try:
            async with asyncio.timeout(30):
                there.change("n", {"pinned": True})
                await app.state.follower.read()
                here.acquire("n").release()
                there.delete("n")
                await app.state.follower.read()
                with pytest.raises(AdapterNotFound):
                    here.acquire("n")
        finally:
            may_answer.set()
        await asyncio.to_thread(wait_until, lambda: app.state.follower._pinning.done(), 30.0)
        await app.state.follower.read()
        there.register(Registration("m"), make_adapter(tmp_path / "n"))
        record = there.change("m", {"pinned": True})
        await app.state.follower.read()
        assert engine.kept == {record.id}

    asyncio.run(run())


def test_others_are_answered_while_files_of_adapters_do_not_come(
    open_catalog, tmp_path, vocabulary
):
    here, there = open_catalog("here"), open_catalog("there")
    there.register(Registration("n"), make_adapter(tmp_path / "n"))
    config = Config(data_dir=tmp_path / "here", registry_url=f"sqlite:///{tmp_path / 'registry'}")
    services = Services(config, FakeEngine(), here, vocabulary, base_names=(BASE,))

    async def run() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        app = httpx.ASGITransport(create_app(services))
        async with httpx.AsyncClient(transport=app, base_url="http://localhost") as client:

            def ask(model: str) -> asyncio.Task[httpx.Response]:
                body = {"model": model, "prompt": "hello", "max_tokens": 2}
                return asyncio.create_task(client.post("/v1/completions", json=body))

            waiting = [ask("n") for _ in range(3)]
            async with asyncio.timeout(30):
                assert (await ask(BASE)).status_code == 200
                assert (await client.get("/v1/adapters")).json()["data"][0]["name"] == "n"
                assert not any(task.done() for task in waiting)
            StuckStore.may_read.set()
            assert [(await task).status_code for task in waiting] == [200] * 3

    asyncio.run(run())


def test_users_of_what_was_registered_again_are_not_ended_when_nobody_can_say_so(
    open_catalog, tmp_path, vocabulary
):
    """Another server deleted the name with `cancel`; when it was followed, it was there again."""
    here, engine = open_catalog("here"), FakeEngine()
    StuckStore.may_read.set()
    record, _ = here.register(Registration("n"), make_adapter(tmp_path / "n"))
    config = Config(data_dir=tmp_path / "here", registry_url=f"sqlite:///{tmp_path / 'registry'}")
    services = Services(config, engine, here, vocabulary, base_names=(BASE,))
    engine.gate = threading.Event()

    async def run() -> None:
        app = create_app(services)
        await app.state.follower.read()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"model": "n", "prompt": "hello", "max_tokens": 2}
            answer = asyncio.create_task(client.post("/v1/completions", json=body))
            await asyncio.to_thread(wait_until, lambda: bool(engine.submitted), 30.0)
            with here.database.begin() as connection:
                connection.exec_driver_sql("ALTER TABLE versions RENAME TO versions_gone")
            app.state.follower._removals.cancel_users("n", {record.id})
            await asyncio.sleep(0.3)
            with here.database.begin() as connection:
                connection.exec_driver_sql("ALTER TABLE versions_gone RENAME TO versions")
            await asyncio.sleep(0.3)
            engine.gate.set()
            assert (await answer).status_code == 200, answer.result().text

    asyncio.run(run())
    assert not engine.cancelled
