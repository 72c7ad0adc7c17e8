from __future__ import annotations

import asyncio
import socket
import threading

import httpx
import pytest

from loraplex_server.__main__ import bind, main
from loraplex_server.adapters.audit_log import Actor
from loraplex_server.api import last_writes
from loraplex_server.api.server import Server
from loraplex_server.api.services import Services
from loraplex_server.config import Config
from loraplex_server.tenants.api_key import KeyWish
from loraplex_server.tenants.key_database import open_key_store
from loraplex_server.tenants.key_store import KeyStore
from loraplex_server.tenants.principal import Role
from tests.server.api.conftest import BASE, wait_until
from tests.support.adapters import make_catalog
from tests.support.fake_engine import FakeEngine


@pytest.fixture
def stoppable(tmp_path, vocabulary):
    """Return a function that starts a `Server` with a grace period: (url, engine, stop, thread)."""
    catalog = make_catalog(tmp_path, base_name=BASE)

    def start(shutdown_grace_s: int, drain_delay_s: float = 0.0, api_key: str | None = None):
        engine = FakeEngine()
        engine.step_s = 0.02
        config = Config(
            data_dir=tmp_path,
            shutdown_grace_s=shutdown_grace_s,
            drain_delay_s=drain_delay_s,
            api_key=api_key,
        )
        services = Services(config, engine, catalog, vocabulary, base_names=(BASE,))
        listener = socket.create_server(("127.0.0.1", 0))
        server = Server(services)
        loops: list[asyncio.AbstractEventLoop] = []

        async def serve() -> None:
            loops.append(asyncio.get_running_loop())
            with listener:
                await server.serve_until_signal(listener)

        thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        return url, engine, lambda: loops[0].call_soon_threadsafe(server.stop), thread

    yield start
    catalog.close()


def test_connections_send_small_chunks_at_once():
    """Of a socket that does not say it is TCP, asyncio leaves Nagle's algorithm on."""

    async def nodelay() -> int:
        options: asyncio.Queue[int] = asyncio.Queue()

        def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peer = writer.get_extra_info("socket")
            options.put_nowait(peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with bind(Config(port=0)) as listener:
            async with await asyncio.start_server(accept, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname()[:2])
                async with asyncio.timeout(10):
                    found = await options.get()
                writer.close()
                return found

    assert asyncio.run(nodelay())


def endless(max_tokens: int) -> dict:
    return {
        "model": BASE,
        "prompt": "abc",
        "stream": True,
        "max_tokens": max_tokens,
        "ignore_eos": True,
    }


def stream_until_stopped(url, stop, max_tokens: int) -> str:
    body = endless(max_tokens)
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as answer:
        pieces = answer.iter_text()
        first = next(pieces)
        stop()
        return first + "".join(pieces)


def test_a_running_stream_finishes_within_the_grace_period(stoppable, capfd):
    url, _, stop, thread = stoppable(20)
    text = stream_until_stopped(url, stop, max_tokens=20)
    assert '"finish_reason":"length"' in text
    assert text.endswith("data: [DONE]\n\n")
    thread.join(timeout=10)
    assert not thread.is_alive()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
    greeting = capfd.readouterr().out
    assert f"loraplex serves {BASE} at {url}" in greeting
    assert f"curl {url}/v1/chat/completions" in greeting
    assert "key" not in greeting


def test_a_database_that_hangs_holds_the_end_up_for_a_while_only(stoppable, monkeypatch, caplog):
    may_answer = threading.Event()
    monkeypatch.setattr(last_writes, "LAST_WRITES_S", 0.1)
    monkeypatch.setattr(KeyStore, "touch", lambda store, uses: may_answer.wait(60))
    _, _, stop, thread = stoppable(0)
    stop()
    try:
        wait_until(lambda: "is not written down" in caplog.text)
    finally:
        may_answer.set()  # or the loop would wait for its threads: that is for `main` to bound
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.mark.parametrize("setting", [None, "lp-secret"])
def test_the_greeting_brings_a_key_wherever_it_is_kept(stoppable, tmp_path, setting, capfd):
    if setting is None:
        with open_key_store(Config(data_dir=tmp_path)) as store:
            store.create(KeyWish("ops", Role.ADMIN, ""), Actor())
    _, _, stop, thread = stoppable(0, api_key=setting)
    stop()
    thread.join(timeout=10)
    greeting = capfd.readouterr().out
    assert '-H "authorization: Bearer $LORAPLEX_API_KEY"' in greeting
    assert "lp-secret" not in greeting


def test_after_the_grace_period_streams_end_with_an_error(stoppable):
    url, engine, stop, thread = stoppable(0)
    text = stream_until_stopped(url, stop, max_tokens=250)
    assert '"code":"server_stopping"' in text
    assert text.endswith("data: [DONE]\n\n")
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert engine.num_running == 0


def test_a_draining_server_refuses_work_but_listens_until_the_last_answer(stoppable):
    url, engine, stop, thread = stoppable(20)
    gate = threading.Event()
    engine.gate = gate
    with httpx.stream("POST", f"{url}/v1/completions", json=endless(20), timeout=20) as answer:
        pieces = answer.iter_text()
        next(pieces)
        assert httpx.get(f"{url}/ready").json() == {"status": "ready"}
        stop()
        wait_until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        assert httpx.get(f"{url}/ready").json() == {"status": "draining"}
        assert httpx.get(f"{url}/ping").status_code == 503
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/load").json()["server_load"] == 1
        for path in ("/v1/completions", "/v1/adapters", "/v1/adapters/a/prefetch"):
            refused = httpx.post(f"{url}{path}", json=endless(1))
            assert (refused.status_code, refused.headers["connection"]) == (503, "close")
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "server_stopping"
            assert refused.headers["x-request-id"]
        assert thread.is_alive()
        gate.set()
        text = "".join(pieces)
    assert '"finish_reason":"length"' in text
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert [reason.value for reason in engine.ended.values()] == ["length"]


def test_with_a_delay_the_server_serves_on_while_balancers_notice(stoppable):
    url, _, stop, thread = stoppable(20, drain_delay_s=1000)
    with httpx.Client(base_url=url) as kept:
        assert "connection" not in kept.get("/version").headers
        stop()
        wait_until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        served = kept.post("/v1/completions", json={"model": BASE, "prompt": "a", "max_tokens": 1})
        assert (served.status_code, served.headers["connection"]) == (200, "close")
    stop()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_a_second_signal_ends_at_once(stoppable):
    url, engine, stop, thread = stoppable(1000)
    engine.gate = threading.Event()  # never opens: the answer would take for ever

    def stop_twice() -> None:
        stop()
        stop()

    with pytest.raises(httpx.TransportError):
        stream_until_stopped(url, stop_twice, max_tokens=250)
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_a_busy_port_is_one_clear_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"loraplex serve: cannot listen on 127.0.0.1:{port}: ")
    assert error.count("\n") == 1


def test_a_wrong_setting_is_one_clear_line(capsys):
    assert main(["--prot", "1"]) == 2
    assert capsys.readouterr().err == (
        "loraplex serve: unknown argument --prot; did you mean --port?\n"
    )


def test_a_model_that_is_not_there_is_one_clear_line(capsys, tmp_path):
    argv = ["--model", str(tmp_path / "none.gguf"), "--port", "0", "--data-dir", str(tmp_path)]
    assert main(argv) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("loraplex serve: ")
    assert "none.gguf" in error
