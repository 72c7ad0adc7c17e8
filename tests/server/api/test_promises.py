"""Priorities, deadlines, first tokens in time, and being told to come again later."""

from __future__ import annotations

import json
import time

import openai
import pytest

from loraplex_scheduler.plan import EndEvent, FinishReason
from tests.server.api.conftest import BASE, running_server, wait_until

OVERLOADED = 'loraplex_requests_rejected_total{reason="overloaded"}'
REJECTED = 'loraplex_requests_finished_total{outcome="rejected"}'
CANCELLED = 'loraplex_requests_finished_total{outcome="cancelled"}'
BODIES = {
    "/v1/completions": {"model": BASE, "prompt": "abcdef"},
    "/v1/chat/completions": {"model": BASE, "messages": [{"role": "user", "content": "abcdef"}]},
}


def reject(engine, *, retry_after_s: float | None = 2.4, after: int = 0) -> None:
    engine.end_with = EndEvent("", FinishReason.REJECTED, "come later", retry_after_s)
    engine.end_after = after


@pytest.mark.parametrize("path", BODIES)
def test_what_is_asked_beyond_the_answer_reaches_the_engine(server, path):
    terms = {"priority": -3, "deadline_s": 20, "ttft_slo_s": 0.5}
    assert server.post(path, BODIES[path] | terms).status_code == 200
    [request] = server.engine.submitted
    assert request.priority == -3
    assert request.deadline_s - request.arrival_s == pytest.approx(20)
    assert request.first_token_by_s - request.arrival_s == pytest.approx(0.5)


def test_who_asks_for_nothing_gets_what_the_server_promises(server, tmp_path, vocabulary):
    server.post("/v1/completions", BODIES["/v1/completions"])
    [request] = server.engine.submitted
    assert (request.priority, request.tenant, request.first_token_by_s) == (0, "", None)
    assert request.deadline_s - request.arrival_s == pytest.approx(600)
    with running_server(tmp_path, vocabulary, ttft_slo_s=1.5) as promising:
        promising.post("/v1/completions", BODIES["/v1/completions"])
        promising.post("/v1/completions", BODIES["/v1/completions"] | {"ttft_slo_s": 9.0})
        firsts = [r.first_token_by_s - r.arrival_s for r in promising.engine.submitted]
    assert firsts == pytest.approx([1.5, 9.0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("priority", 1.5),
        ("priority", "high"),
        ("priority", 2**53),
        ("deadline_s", 0),
        ("deadline_s", "soon"),
        ("ttft_slo_s", -1),
        ("ttft_slo_s", True),
        ("ttft_slo", 1),
    ],
)
def test_a_promise_that_means_nothing_is_refused_by_name(server, field, value):
    answer = server.post("/v1/completions", BODIES["/v1/completions"] | {field: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


@pytest.mark.parametrize("stream", [False, True])
def test_a_timeout_says_whose_time_was_up(server, client, stream):
    server.engine.end_with = EndEvent("", FinishReason.TIMED_OUT, "late")

    def error_of(**extra: object) -> openai.InternalServerError:
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model=BASE, prompt="x", stream=stream, extra_body=extra)
        assert caught.value.status_code == 504
        assert caught.value.response.headers["x-should-retry"] == "false"
        return caught.value

    own = error_of(deadline_s=2.5)
    assert (own.code, own.param) == ("deadline_exceeded", "deadline_s")
    assert "the request's deadline_s of 2.5 s" in own.message
    for servers in (error_of(), error_of(deadline_s=601)):
        assert (servers.code, servers.param) == ("request_timeout", None)
        assert "the server's request_timeout_s of 600 s" in servers.message


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_a_rejected_request_is_told_when_to_come_again(server, path, stream):
    before = [server.metric(name) for name in (OVERLOADED, REJECTED)]
    reject(server.engine)
    answer = server.post(path, BODIES[path] | {"stream": stream})
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "3"
    assert answer.headers["retry-after-ms"] == "2400"
    assert answer.json()["error"] == {
        "message": "come later",
        "type": "rate_limit_error",
        "param": None,
        "code": "overloaded",
        "retry_after_s": 2.4,
    }
    after = [server.metric(name) for name in (OVERLOADED, REJECTED)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1]


@pytest.mark.parametrize("retry_after_s", [None, float("inf"), float("nan")])
def test_an_engine_that_cannot_tell_when_still_gets_an_answer_out(server, retry_after_s):
    reject(server.engine, retry_after_s=retry_after_s)
    answer = server.post("/v1/completions", BODIES["/v1/completions"])
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")


def test_openais_client_waits_as_long_as_it_is_told_and_tries_again(server):
    reject(server.engine, retry_after_s=0.3)
    server.engine.is_ending = lambda request: len(server.engine.submitted) == 1
    with server.openai().with_options(max_retries=1) as client:
        started = time.monotonic()
        answer = client.completions.create(model=BASE, prompt="hello")
        took_s = time.monotonic() - started
    assert answer.choices[0].text == "hello"
    assert len(server.engine.submitted) == 2
    assert took_s >= 0.3


def test_one_rejected_sample_rejects_the_whole_answer_and_is_counted_once(server):
    engine = server.engine
    reject(engine, after=2)
    engine.is_ending = lambda request: request.request_id.endswith("-1")
    engine.step_s = 0.02
    before = [server.metric(name) for name in (OVERLOADED, REJECTED, CANCELLED)]
    answer = server.post("/v1/completions", BODIES["/v1/completions"] | {"n": 3, "max_tokens": 99})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    wait_until(lambda: engine.num_running == 0)
    after = [server.metric(name) for name in (OVERLOADED, REJECTED, CANCELLED)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 2]
    assert sorted(engine.ended.values()) == ["cancelled", "cancelled", "rejected"]


def test_several_rejected_samples_are_one_rejected_request(server):
    before = server.metric(OVERLOADED)
    reject(server.engine)
    body = {"model": BASE, "prompt": ["a", "b"], "n": 2}
    assert server.post("/v1/completions", body).status_code == 429
    assert server.metric(OVERLOADED) - before == 1


def test_a_sample_rejected_after_the_stream_began_is_an_error_event(server, client):
    engine = server.engine
    reject(engine, after=3)
    engine.is_ending = lambda request: request.request_id.endswith("-1")
    engine.step_s = 0.01
    body = BODIES["/v1/completions"] | {"n": 2, "stream": True, "ignore_eos": True}
    answer = server.post("/v1/completions", body | {"max_tokens": 200})
    assert answer.status_code == 200
    *texts, error, done, _ = answer.text.split("\n\n")
    assert texts
    assert done == "data: [DONE]"
    told = json.loads(error.removeprefix("data: "))["error"]
    assert (told["code"], told["retry_after_s"]) == ("overloaded", 2.4)
    wait_until(lambda: engine.num_running == 0)
    assert sorted(engine.ended.values()) == ["cancelled", "rejected"]
