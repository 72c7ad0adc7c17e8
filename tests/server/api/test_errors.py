from __future__ import annotations

import json
import threading

import httpx
import openai
import pytest

from loraplex_memory.errors import MemoryAccountError
from loraplex_scheduler.errors import SchedulerError
from loraplex_scheduler.plan import EndEvent, FinishReason
from loraplex_server.adapters.errors import AdapterError
from loraplex_server.api.completions import CompletionFormat
from loraplex_server.api.error_table import ERROR_TABLE, error_response, shape_of
from loraplex_server.api.errors import ApiError, InvalidRequest
from loraplex_server.engine.errors import EngineError
from loraplex_server.engine.messages import EngineState
from loraplex_server.model.errors import ModelError
from loraplex_server.text.errors import TextError
from tests.server.api.conftest import BASE, running_server

#: Families that never reach a client on purpose: their base class is mapped, to a plain 500.
INTERNAL = (MemoryAccountError, ModelError)


def subclasses(kind: type[Exception]) -> list[type[Exception]]:
    found = kind.__subclasses__()
    return found + [deeper for child in found for deeper in subclasses(child)]


@pytest.mark.parametrize("base", [SchedulerError, EngineError, AdapterError, TextError, ApiError])
def test_every_error_of_every_package_is_in_the_table(base):
    assert subclasses(base)
    missing = [kind.__name__ for kind in subclasses(base) if kind not in ERROR_TABLE]
    assert missing == []


@pytest.mark.parametrize("base", INTERNAL)
def test_errors_from_the_inside_say_nothing_about_it(base):
    for kind in [base, *subclasses(base)]:
        assert shape_of(kind).is_internal


def test_an_unknown_model_is_openais_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nobody", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "`nobody`" in caught.value.message


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("content", "content_type", "message"),
    [
        (b"{", "application/json", "not valid JSON"),
        (b"", "application/json", "empty"),
        (b"[1]", "application/json", "must be a JSON object"),
        (b'"x"', "application/json", "must be a JSON object"),
        (b"{}", "application/json", "`model` is required"),
        (b"model=x", "application/x-www-form-urlencoded", "content-type must be"),
        (b"{}", "text/plain", "content-type must be"),
        (b"\xff\xfe{", "application/json", ""),
        (b"[" * 100_000, "application/json", ""),
        (b'{"model": ' + b"9" * 5000 + b"}", "application/json", ""),
    ],
)
def test_a_body_that_is_no_json_object_is_a_bad_request(
    server, path, content, content_type, message
):
    answer = httpx.post(
        server.url + path, content=content, headers={"content-type": content_type}, timeout=20
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]


def test_a_huge_body_is_refused(server):
    with server.http() as http:
        answer = http.post("/v1/completions", content=(b"x" * (1 << 20) for _ in range(9)))
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


def test_unknown_paths_and_methods_have_the_same_shape(server):
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["code"] == "not_found"
    answer = httpx.get(f"{server.url}/v1/completions")
    assert answer.status_code == 405
    assert answer.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("reason", "kind", "code"),
    [
        (FinishReason.REFUSED, openai.BadRequestError, "request_refused"),
        (FinishReason.FAILED, openai.InternalServerError, "generation_failed"),
        (FinishReason.CANCELLED, openai.InternalServerError, "server_stopping"),
    ],
)
def test_an_end_before_any_text_has_its_status(server, client, stream, reason, kind, code):
    server.engine.end_with = EndEvent("", reason, "because")
    with pytest.raises(kind) as caught:
        client.completions.create(model=BASE, prompt="x", stream=stream)
    assert caught.value.code == code
    assert "because" in caught.value.message


def test_a_failure_in_the_middle_ends_the_stream_with_an_error(server, client):
    server.engine.end_with = EndEvent("", FinishReason.FAILED, "out of luck")
    server.engine.end_after = 3
    body = {"model": BASE, "prompt": "abcdef", "stream": True}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200
    *_, error, done, _ = answer.text.split("\n\n")
    assert '"message":"out of luck"' in error
    assert done == "data: [DONE]"
    with pytest.raises(openai.APIError, match="out of luck"):
        list(client.completions.create(model=BASE, prompt="abcdef", stream=True))


def test_one_failing_sample_ends_the_others(server):
    engine = server.engine
    engine.end_with, engine.end_after = EndEvent("", FinishReason.FAILED, "bad"), 2
    answer = server.post("/v1/completions", {"model": BASE, "prompt": "abcdef", "n": 3})
    assert answer.status_code == 500


def test_an_engine_that_is_down_answers_503_with_retry_after(server, client):
    server.engine.state = EngineState.RESTARTING
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model=BASE, prompt="x")
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "5"
    assert httpx.get(f"{server.url}/health").status_code == 503
    server.engine.state = EngineState.READY
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"


def test_a_failure_of_a_dying_engine_asks_to_retry(server):
    server.engine.end_with = EndEvent("", FinishReason.FAILED, "the engine failed")
    server.engine.end_after = 2
    submit = server.engine.submit

    def submit_and_die(requests, take):
        submission = submit(requests, take)
        server.engine.state = EngineState.RESTARTING
        return submission

    server.engine.submit = submit_and_die
    try:
        answer = server.post("/v1/completions", {"model": BASE, "prompt": "abcdef"})
    finally:
        del server.engine.submit
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_more_than_the_queue_takes_is_refused_with_429(tmp_path, vocabulary):
    with running_server(tmp_path, vocabulary, max_running=2, max_queued=1) as server:
        server.engine.gate = threading.Event()
        body = {"model": BASE, "prompt": "x", "n": 3, "max_tokens": 100, "ignore_eos": True}
        with (
            server.http() as http,
            http.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream,
        ):
            pieces = stream.iter_raw()  # kept: httpx closes the stream with it
            next(pieces)
            refused = server.post("/v1/completions", {"model": BASE, "prompt": "x"})
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["code"] == "queue_full"
        never = server.post("/v1/completions", {"model": BASE, "prompt": "x", "n": 4})
        assert never.status_code == 400
        assert never.json()["error"]["param"] == "n"


def test_an_unforeseen_exception_is_a_plain_500(server, caplog):
    def explode(_: str) -> None:
        raise ZeroDivisionError("secret")

    get = server.catalog.get
    server.catalog.get = explode
    try:
        answer = httpx.get(f"{server.url}/v1/models/x", headers={"x-request-id": "abc"})
    finally:
        server.catalog.get = get
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] == "abc"


def test_request_ids_come_back(server):
    given = httpx.get(f"{server.url}/health", headers={"x-request-id": "my-id"})
    assert given.headers["x-request-id"] == "my-id"
    drawn = {httpx.get(f"{server.url}/health").headers["x-request-id"] for _ in range(2)}
    assert len(drawn) == 2
    unusable = httpx.get(f"{server.url}/health", headers={"x-request-id": "a b" * 100})
    assert unusable.headers["x-request-id"] != "a b" * 100


@pytest.mark.parametrize("method", ["stream_head", "stream_delta", "stream_tail"])
def test_an_unforeseen_exception_in_a_stream_is_an_event(server, monkeypatch, caplog, method):
    def explode(*_: object) -> bytes:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(CompletionFormat, method, explode)
    body = {"model": BASE, "prompt": "abcdef", "stream": True}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200
    *_, error, done, _ = answer.text.split("\n\n")
    assert '"code":"internal_error"' in error
    assert done == "data: [DONE]"
    assert "secret" not in answer.text
    assert "ZeroDivisionError: secret" in caplog.text


def test_an_error_may_quote_half_a_surrogate_pair():
    answer = error_response(InvalidRequest("unknown field `\ud800`", param="\ud800"))
    assert answer.body.isascii()
    assert json.loads(answer.body)["error"]["param"] == "\ud800"
