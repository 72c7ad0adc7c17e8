from __future__ import annotations

import json
import threading

import httpx

from loraplex_server.engine.messages import EngineStats
from tests.server.api.conftest import BASE, wait_until


def answers(server, method: str, route: str, status: int) -> float:
    labels = f'method="{method}",route="{route}",status="{status}"'
    return server.metric(f"loraplex_http_requests_total{{{labels}}}")


def test_answers_are_counted_by_template_of_path_and_status(server):
    httpx.get(f"{server.url}/v1/models/no-such-model-1")
    httpx.get(f"{server.url}/v1/models/no-such-model-2")
    httpx.get(f"{server.url}/no/such/path")
    httpx.request("BREW", f"{server.url}/version")
    page = httpx.get(f"{server.url}/metrics").text
    assert "no-such-model" not in page
    assert "/no/such" not in page
    assert "BREW" not in page
    [missing] = [
        line
        for line in page.splitlines()
        if 'method="GET",route="/v1/models/{' in line and 'status="404"' in line
    ]
    assert float(missing.split()[-1]) >= 2
    assert answers(server, "GET", "(none)", 404) >= 1
    assert answers(server, "other", "/version", 405) >= 1


def test_refusals_of_the_guard_are_counted_too(server):
    headers = {"sec-fetch-site": "cross-site"}
    refused = httpx.post(f"{server.url}/v1/completions", headers=headers)
    assert refused.status_code == 403
    assert answers(server, "POST", "(none)", 403) >= 1


def test_open_streams_are_counted_until_they_end_or_are_left(server):
    server.engine.gate = threading.Event()
    body = {"model": BASE, "prompt": "hello", "max_tokens": 200, "ignore_eos": True}
    url = f"{server.url}/v1/completions"
    with httpx.stream("POST", url, json={**body, "stream": True}) as response:
        lines = response.iter_lines()  # who drops it leaves
        next(lines)
        assert server.metric("loraplex_sse_streams_open") == 1
        assert server.metric("loraplex_http_requests_open") == 2  # and the one that asks
    wait_until(lambda: server.metric("loraplex_sse_streams_open") == 0)
    assert server.metric("loraplex_http_requests_open") == 1


def test_a_complete_answer_is_no_stream(server):
    server.engine.gate = threading.Event()
    body = {"model": BASE, "prompt": "hello", "max_tokens": 8, "ignore_eos": True}
    asking = threading.Thread(target=lambda: server.post("/v1/completions", body))
    asking.start()
    wait_until(lambda: server.metric("loraplex_http_requests_open") == 2)
    assert server.metric("loraplex_sse_streams_open") == 0
    server.engine.gate.set()
    asking.join()


def test_who_asks_for_it_is_told_the_load(server):
    server.engine.stats = EngineStats(num_running=3, num_waiting=2, pages_kv=16, pages_free=48)
    url, name = f"{server.url}/v1/completions", "endpoint-load-metrics"
    body = {"model": BASE, "prompt": "hello"}
    as_json = httpx.post(url, json=body, headers={f"{name}-format": "json"}).headers[name]
    kind, _, report = as_json.partition(" ")
    assert kind == "JSON"
    assert json.loads(report) == {
        "named_metrics": {
            "kv_cache_usage_perc": 0.25,
            "num_requests_running": 3,
            "num_requests_waiting": 2,
        }
    }
    as_text = httpx.post(url, json=body, headers={f"{name}-format": "TEXT"}).headers[name]
    assert as_text == (
        "TEXT named_metrics.kv_cache_usage_perc=0.25,named_metrics.num_requests_running=3,"
        "named_metrics.num_requests_waiting=2"
    )


def test_nobody_else_is_told_the_load(server):
    body = {"model": BASE, "prompt": "hello", "stream": True}
    for headers in ({}, {"endpoint-load-metrics-format": "BIN"}):
        answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200
        assert "endpoint-load-metrics" not in answer.headers
