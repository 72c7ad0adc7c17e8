"""Traces and logs of requests, as a collector and a log reader receive them."""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Iterator

import httpx
import pytest

from loraplex_scheduler.plan import EndEvent, FinishReason
from loraplex_server.api.traces import TracesUnavailable, open_traces
from loraplex_server.logs import ACCESS_LOG, REQUEST_ID, JsonFormatter
from tests.server.api.conftest import BASE, make_adapter, running_server, wait_until
from tests.support.otlp import Collector, attributes, collecting

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PHASES = ["queue", "load_adapter", "prefill", "decode"]


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture
def traced(tmp_path, vocabulary, collector, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    settings = {"otlp_endpoint": collector.url, "tenant_header": "x-tenant"}
    with running_server(tmp_path / "data", vocabulary, **settings) as server:
        server.upload("pirate", make_adapter(tmp_path / "pirate"))
        yield server
        server.app.state.observation._traces.close()


def wait_for(server, collector, num_requests: int = 1) -> list:
    """Return all spans once so many requests for completions are among them."""

    def has_come() -> bool:
        server.app.state.observation._traces._provider.force_flush()
        names = [span.name for span in collector.spans()]
        return names.count("POST /v1/completions") == num_requests

    wait_until(has_come, timeout_s=10)
    return collector.spans()


def test_a_request_is_one_trace_from_the_callers_span_down_to_decoding(traced, collector):
    headers = {
        "traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01",
        "x-request-id": "req-7",
        "x-tenant": "acme",
        "authorization": "Bearer sk-secret",
    }
    body = {"model": "pirate", "prompt": "hello world", "n": 2}
    answer = httpx.post(f"{traced.url}/v1/completions?q=hidden", json=body, headers=headers)
    assert answer.status_code == 200
    spans = wait_for(traced, collector)
    assert set(collector.paths) == {"/v1/traces"}
    ours = [span for span in spans if span.trace_id.hex() == TRACE_ID]
    [root] = [span for span in ours if span.parent_span_id.hex() == PARENT_ID]
    assert root.name == "POST /v1/completions"
    assert attributes(root)["loraplex.request_id"] == "req-7"
    assert attributes(root)["http.response.status_code"] == 200
    sequences = [span for span in ours if span.parent_span_id == root.span_id]
    assert [attributes(span)["loraplex.sequence"] for span in sequences] == [0, 1]
    for span in sequences:
        said = attributes(span)
        assert said["gen_ai.request.model"] == "pirate"
        assert said["loraplex.adapter_ids"] == [traced.catalog.get("pirate").id]
        assert said["loraplex.tenant"] == "acme"
        assert said["gen_ai.usage.output_tokens"] == answer.json()["usage"]["completion_tokens"] / 2
        assert said["gen_ai.response.finish_reasons"] == ["stop"]
        phases = [phase for phase in ours if phase.parent_span_id == span.span_id]
        assert [phase.name for phase in phases] == PHASES
        for earlier, later in itertools.pairwise(phases[:3]):
            assert abs(earlier.end_time_unix_nano - later.start_time_unix_nano) < 1000
        assert phases[0].start_time_unix_nano == span.start_time_unix_nano
        assert phases[3].end_time_unix_nano == span.end_time_unix_nano
        assert root.start_time_unix_nano <= span.start_time_unix_nano
        assert span.end_time_unix_nano <= root.end_time_unix_nano
    everything = b"".join(collector.bodies)
    assert b"sk-secret" not in everything
    assert b"hidden" not in everything
    assert b"hello" not in everything


def test_the_trace_of_a_failure_says_so(traced, collector):
    traced.engine.end_with = EndEvent("", FinishReason.FAILED, "broken")
    answer = httpx.post(f"{traced.url}/v1/completions", json={"model": BASE, "prompt": "x"})
    assert answer.status_code == 500
    spans = wait_for(traced, collector)
    failed = {span.name for span in spans if span.status.code == 2}
    assert failed == {"POST /v1/completions", "generate"}


def test_a_caller_that_does_not_sample_is_not_traced(traced, collector):
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}
    body = {"model": BASE, "prompt": "x"}
    assert httpx.post(f"{traced.url}/v1/completions", json=body, headers=headers).is_success
    assert httpx.post(f"{traced.url}/v1/completions", json=body).is_success
    assert TRACE_ID not in {span.trace_id.hex() for span in wait_for(traced, collector)}


def test_one_access_line_tells_who_asked_for_what_and_no_secret(tmp_path, vocabulary, caplog):
    settings = {"access_log": True, "tenant_header": "x-tenant", "api_key": "sk-secret"}
    with (
        caplog.at_level(logging.INFO, logger=ACCESS_LOG),
        running_server(tmp_path / "data", vocabulary, **settings) as server,
    ):
        httpx.post(
            f"{server.url}/v1/completions?key=sk-hidden",
            json={"model": BASE, "prompt": "hello"},
            headers={
                "authorization": "Bearer sk-secret",
                "x-tenant": "acme",
                "x-request-id": "req-1",
            },
        )
    [record] = [record for record in caplog.records if record.name == ACCESS_LOG]
    line = json.loads(JsonFormatter().format(record))
    seconds = line.pop("seconds")
    assert seconds > 0
    assert line.pop("time").endswith("+00:00")
    assert line.pop("message").startswith("POST '/v1/completions' 200 ")
    assert line == {
        "level": "info",
        "logger": ACCESS_LOG,
        "request_id": "req-1",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "model": BASE,
        "tenant": "acme",
        "prompt_tokens": 1,
        "generated_tokens": 2,
    }
    assert "sk-" not in caplog.text


def test_nobody_asked_for_access_lines(server, caplog):
    with caplog.at_level(logging.DEBUG):
        httpx.get(f"{server.url}/health")
    assert [record for record in caplog.records if record.name == ACCESS_LOG] == []


def test_lines_of_json_carry_the_request_and_the_exception():
    def log_line() -> str:
        try:
            raise ValueError("no such thing")
        except ValueError:
            record = logging.makeLogRecord({"msg": "it \n broke %s", "args": ("here",)})
            record.exc_info = sys.exc_info()
            return JsonFormatter().format(record)

    token = REQUEST_ID.set("req-9")
    try:
        line = log_line()
    finally:
        REQUEST_ID.reset(token)
    assert "\n" not in line
    assert json.loads(line)["request_id"] == "req-9"
    assert "no such thing" in json.loads(line)["exception"]
    assert json.loads(line)["message"] == "it \n broke here"


def test_without_the_library_the_server_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(TracesUnavailable, match=r"pip install 'loraplex\[trace\]'"):
        open_traces("http://localhost:4318")
