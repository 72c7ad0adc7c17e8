from __future__ import annotations

import socket
import threading

import pytest

from loraplex_scheduler.plan import FinishReason
from tests.server.api.conftest import BASE, wait_until

LONG = {"model": BASE, "prompt": "abc", "max_tokens": 200, "ignore_eos": True}


@pytest.fixture(autouse=True)
def held_engine(server):
    """No answer comes to its end before its client has left."""
    server.engine.gate = threading.Event()


def wait_for_cancel(server, num: int = 1) -> None:
    wait_until(lambda: len(server.engine.cancelled) == num)
    wait_until(lambda: server.engine.num_running == 0)
    assert [*server.engine.ended.values()] == [FinishReason.CANCELLED] * num


def test_leaving_a_stream_cancels_all_its_sequences(server):
    before = server.metric('loraplex_requests_finished_total{outcome="cancelled"}')
    body = {**LONG, "stream": True, "n": 3}
    with server.http() as http, http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_raw())
    wait_for_cancel(server, 3)
    after = server.metric('loraplex_requests_finished_total{outcome="cancelled"}')
    assert after == before + 3


def test_the_openai_client_closing_its_stream_cancels(server, client):
    with client.completions.create(
        model=BASE, prompt="abc", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    wait_for_cancel(server)


@pytest.mark.parametrize("stream", ["true", "false"])
def test_leaving_before_the_answer_begins_cancels(server, stream):
    server.engine.hold_after = 0
    raw = (
        f'{{"model": "{BASE}", "prompt": "abc", "max_tokens": 200, "stream": {stream}}}'
    ).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(raw), raw)
        )
        wait_until(lambda: len(server.engine.submitted) == 1)
    wait_for_cancel(server)


def test_the_lease_ends_with_the_engines_last_event(server, adapter):
    adapter_id = server.catalog.get(adapter).id
    body = {**LONG, "model": adapter, "stream": True}
    with server.http() as http, http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_raw())
        assert server.catalog.num_leases(adapter_id) == 1
        assert server.engine.submitted[0].adapter.adapter_id == adapter_id
    wait_until(lambda: server.catalog.num_leases(adapter_id) == 0)


def test_a_deleted_adapter_finishes_what_runs_on_it(server, adapter):
    adapter_id = server.catalog.get(adapter).id
    body = {**LONG, "model": adapter, "stream": True, "max_tokens": 30}
    with server.http() as http, http.stream("POST", "/v1/completions", json=body) as answer:
        pieces = answer.iter_text()
        next(pieces)
        with server.http() as other:
            gone = other.delete(f"/v1/adapters/{adapter}", params={"timeout_s": 0})
            assert (gone.status_code, gone.json()["error"]["code"]) == (504, "adapter_draining")
            assert gone.json()["error"]["running"] == 1
        assert server.post("/v1/completions", body).status_code == 404
        assert server.engine.discarded == []
        server.engine.gate.set()
        text = "".join(pieces)
    assert '"finish_reason":"length"' in text
    assert text.endswith("data: [DONE]\n\n")
    wait_until(lambda: server.engine.discarded == [adapter_id])
