"""The front over a stand-in for Serve's handle: what it asks of the router, and what it tells."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import httpx
import pytest

pytest.importorskip("ray.serve", reason="pip install 'loraplex[ray]'")

from ray.exceptions import ActorDiedError
from ray.serve.config import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from loraplex_server.engine.errors import EngineUnavailable
from loraplex_server.ray_serve.answer_pipe import WholeAnswer
from loraplex_server.ray_serve.front import Front, front_app

START = {"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", b"theirs")]}
BODY = {"type": "http.response.body", "body": b"hello"}


class Answering:
    """A response of Serve's: batches of messages, of which one may be an exception to raise."""

    def __init__(self, *batches):
        self._batches = list(batches)
        self.is_cancelled = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self._batches:
            raise StopAsyncIteration
        batch = self._batches.pop(0)
        if isinstance(batch, Exception):
            raise batch
        if batch is None:
            await asyncio.Event().wait()
        return batch

    def cancel(self):
        self.is_cancelled = True


class Handle:
    """Serve's handle: one answer for all, and what was asked with which options."""

    def __init__(self, answer=None, pages=None):
        self.keys, self.requests = [], []
        self._pages = pages
        self.answer = SimpleNamespace(
            remote=lambda request: self.requests.append(request) or answer
        )
        self.base_names = SimpleNamespace(remote=self._base_names)

    def options(self, *, stream, multiplexed_model_id):
        assert stream
        self.keys.append(multiplexed_model_id)
        return self

    async def _base_names(self):
        return ("base",)

    def broadcast(self, method, request):
        async def results_async(timeout_s, return_exceptions):
            assert return_exceptions
            if not self._pages:
                raise DeploymentUnavailableError(DeploymentID(name="replica"))
            return [
                page if isinstance(page, Exception) else (name, page)
                for name, page in self._pages.items()
            ]

        assert method == "answer_whole"
        return SimpleNamespace(results_async=results_async)


def client_of(handle, request_timeout_s=60.0):
    app = front_app(Front(handle, request_timeout_s), receive_timeout_s=30.0)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front")


async def test_the_router_is_told_the_adapter_and_nothing_of_the_base_model():
    for model, key in (("pirate", "pirate"), ("base", "")):
        answering = Answering([START, BODY])
        handle = Handle(answering)
        async with client_of(handle) as client:
            answer = await client.post("/v1/completions", json={"model": model})
        assert (answer.status_code, answer.text) == (200, "hello")
        assert "x-request-id" not in answer.headers  # Serve's proxy writes it
        assert handle.keys == [key]
        assert answering.is_cancelled


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (BackPressureError(9, 9), 429, "queue_full"),
        (ActorDiedError(), 503, "engine_unavailable"),
    ],
)
async def test_failures_of_serves_say_when_to_come_back(failure, status, code):
    async with client_of(Handle(Answering(failure))) as client:
        answer = await client.post("/v1/completions", json={"model": "pirate"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers["retry-after"] == "1"


async def test_a_request_that_no_replica_takes_ends_in_time_and_is_cancelled():
    answering = Answering(None)
    async with client_of(Handle(answering), request_timeout_s=0.05) as client:
        answer = await client.post("/v1/completions", json={"model": "pirate"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "request_timeout")
    assert answering.is_cancelled


async def test_a_body_that_the_server_would_not_read_does_not_get_to_it():
    handle = Handle()
    async with client_of(handle) as client:
        answer = await client.post("/v1/completions", content=b"x" * (9 << 20))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert handle.requests == []


@pytest.mark.parametrize(
    ("path", "ending"),
    [
        (
            "/v1/completions",
            b'"code":"engine_unavailable","retry_after_s":1.0}}\n\ndata: [DONE]\n\n',
        ),
        ("/v1/messages", b'"type":"overloaded_error","param":null,'),
    ],
)
async def test_a_stream_whose_replica_dies_ends_with_one_event_that_says_so(path, ending):
    kind = [(b"content-type", b"text/event-stream; charset=utf-8")]
    event = {"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True}
    answering = Answering([{**START, "headers": kind}, event], [event], ActorDiedError())
    async with client_of(Handle(answering)) as client:
        answer = await client.post(path, json={"model": "pirate"})
    assert answer.content.startswith(b"data: 1\n\ndata: 1\n\n")
    assert ending in answer.content
    assert answer.text.count("the replica that had this request is gone") == 1


@pytest.mark.parametrize("kind", [b"application/json", b"text/event-stream"])
async def test_nothing_is_added_to_other_answers_nor_to_a_stream_at_its_end(kind):
    is_stream = kind != b"application/json"
    start = {**START, "headers": [(b"content-type", kind)]}
    body = {"type": "http.response.body", "body": b"{}", "more_body": not is_stream}
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    handle = Handle(Answering([start, body], ActorDiedError()))
    scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": []}
    with pytest.raises(EngineUnavailable):
        await Front(handle, 60.0)(scope, receive, send)
    assert sent == [start, body]


async def test_limits_and_errors_go_by_the_path_below_the_applications_prefix():
    handle = Handle(Answering([START, BODY]))
    app = front_app(Front(handle, 60.0), receive_timeout_s=30.0)
    transport = httpx.ASGITransport(app, root_path="/llm")
    async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
        large = {"file": b"x" * (9 << 20)}
        pieces = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ray.put", lambda piece: pieces.append(piece) or len(pieces))
            answer = await client.post("/llm/v1/adapters", files=large)
        assert answer.status_code == 200, "an upload may be large"
        assert handle.requests[0].path == "/v1/adapters"
        answer = await client.post("/llm/v1/messages", content=b"x" * (9 << 20))
        assert answer.status_code == 413
        assert answer.json()["error"]["type"] == "request_too_large"


async def test_a_websocket_is_refused_and_asks_no_replica():
    handle, sent = Handle(), []

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/completions", "headers": [], "query_string": b""}
    await front_app(Front(handle, 60.0), receive_timeout_s=30.0)(scope, receive, send)
    assert sent == [{"type": "websocket.close"}]
    assert handle.requests == []


def page(status, text):
    return WholeAnswer(status, ((b"content-type", b"text/plain"),), text)


async def test_metrics_are_those_of_all_replicas_that_answer_or_a_refusal():
    good = page(200, b"# HELP x X.\n# TYPE x gauge\nx 1.0\n")
    for pages, status, text in (
        ({"one": good, "two": good}, 200, 'x{replica="one"} 1.0\nx{replica="two"} 1.0\n'),
        ({"one": good, "two": page(401, b"no key")}, 401, "no key"),
        ({"one": good, "two": ActorDiedError()}, 200, 'x{replica="one"} 1.0\n'),
        ({"one": good, "two": ActorDiedError()}, 200, 'ray_replicas{scrape="lost"} 1.0\n'),
        ({"one": ActorDiedError()}, 503, "no replica answered"),
        ({}, 503, "no replica runs; `serve status` says why"),
    ):
        async with client_of(Handle(pages=pages)) as client:
            answer = await client.get("/metrics")
        assert answer.status_code == status
        assert text in answer.text
