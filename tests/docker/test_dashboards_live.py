"""Every query of every dashboard, asked of a real Prometheus that scrapes a server at work."""

from __future__ import annotations

import json
import math
import random
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.server.api.conftest import make_adapter
from tests.support.grafana import DASHBOARDS, queries, with_values
from tests.support.otlp import attributes, collecting
from tests.support.prometheus import Prometheus, needs
from tests.support.server_process import ServerProcess
from tests.support.tiny_models import save_tiny_model
from tests.support.tiny_tokenizer import make_tokenizer

pytestmark = needs("prometheus")

NUM_ADAPTERS = 12
NUM_REQUESTS = 60
#: Some often, most seldom.
ADAPTER_OF = random.Random(1).choices(
    range(NUM_ADAPTERS), [1 / (i + 1) for i in range(NUM_ADAPTERS)], k=NUM_REQUESTS
)


@pytest.fixture(scope="module")
def collector():
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def server(tmp_path_factory, collector):
    folder = tmp_path_factory.mktemp("watched")
    model = folder / "tiny-base"
    save_tiny_model(model, hidden_size=64, vocab_size=320)
    make_tokenizer().save_pretrained(model)
    flags = {
        "--model": str(model),
        "--dtype": "float32",
        "--threads": "1",
        "--page-tokens": "16",
        "--pool-bytes": "160KiB",  # 20 pages; an adapter takes two, a sequence up to five
        "--host-bytes": "96KiB",
        "--max-running": "8",
        "--max-step-tokens": "64",
        "--tenant-header": "x-tenant",
        "--max-queued-per-tenant": "20",
        "--metrics-top-k": "8",
        "--otlp-endpoint": collector.url,
        "--log-format": "json",
        "--access-log": "on",
        "--blob-url": str(folder / "files"),
    }
    # As if other servers had the registry too: a panel shows how well they are followed.
    env = {"LORAPLEX_REGISTRY_URL": f"sqlite:///{folder / 'registry.sqlite3'}"}
    arguments = [text for pair in flags.items() for text in pair]
    server = ServerProcess(folder / "server", *arguments, env=env)
    try:
        server.wait_until_ready()
        for number in range(NUM_ADAPTERS):
            upload(server, f"a{number}", make_adapter(folder / f"a{number}", rank=16, seed=number))
        yield server
    finally:
        server.stop()


def upload(server, name, folder):
    files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
    answer = httpx.post(
        f"{server.base_url}/v1/adapters", data={"name": name}, files=files, timeout=30
    )
    assert answer.status_code == 201, answer.text


@pytest.fixture(scope="module")
def prometheus(server, tmp_path_factory):
    target = server.base_url.removeprefix("http://")
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), target)
    try:
        prometheus.wait_until_scraping()
        yield prometheus
    finally:
        prometheus.stop()


def ask(server, number: int) -> int:
    body = {
        "model": f"a{ADAPTER_OF[number]}" if number % 6 else "tiny-base",
        "prompt": "hello world " * (1 + number % 5),
        "max_tokens": 8 + number % 8,
        "ignore_eos": True,
        "stream": number % 2 == 0,
    }
    if number % 20 == 19:
        body["deadline_s"] = 0.001  # an error
    headers = {"x-tenant": f"t{number % 3}"}
    return httpx.post(
        f"{server.base_url}/v1/completions", json=body, headers=headers, timeout=60
    ).status_code


def test_no_panel_is_without_data(server, prometheus):
    with ThreadPoolExecutor(8) as threads:
        statuses = list(threads.map(lambda number: ask(server, number), range(NUM_REQUESTS)))
        # More than one tenant may have waiting: something to reject.
        body = {"model": "tiny-base", "prompt": ["hello"] * 12, "max_tokens": 4}
        crowd = [
            threads.submit(
                httpx.post,
                f"{server.base_url}/v1/completions",
                json=body,
                headers={"x-tenant": "t0"},
                timeout=60,
            )
            for _ in range(6)
        ]
        assert 429 in {answer.result().status_code for answer in crowd}
    assert statuses.count(200) > NUM_REQUESTS // 2
    missing = wait_for_data(prometheus, timeout_s=45)
    assert missing == []
    # Not by zeros alone: the load did what the panels are there to show.
    for happened in (
        "sum(loraplex_adapter_evictions_total)",
        'sum(loraplex_adapter_load_duration_seconds_count{tier="host"})',
        'sum(loraplex_adapter_load_duration_seconds_count{tier="disk"})',
        'sum(loraplex_requests_rejected_total{reason="tenant_queue_full"})',
        "sum(loraplex_tenant_errors_total)",
        'sum(loraplex_adapter_requests_total{adapter="other"})',
    ):
        wait_for_more_than_zero(prometheus, happened)


def wait_for_data(prometheus, timeout_s: float) -> list[tuple[str, str, str]]:
    """Return dashboard, title and expression of what has no number after so long."""
    missing = [(path.stem, *query) for path in DASHBOARDS for query in queries(path)]
    assert len(missing) > 60
    deadline = time.monotonic() + timeout_s
    while missing and time.monotonic() < deadline:
        time.sleep(0.5)
        missing = [query for query in missing if not has_number(prometheus, query[2])]
    return missing


def wait_for_more_than_zero(prometheus, expr: str, timeout_s: float = 45.0) -> None:
    """Wait until it was scraped that this has happened."""
    deadline = time.monotonic() + timeout_s
    while [value > 0 for _, value in prometheus.query(expr)] != [True]:
        assert time.monotonic() < deadline, expr
        time.sleep(0.5)


def has_number(prometheus, expr: str) -> bool:
    return any(math.isfinite(v) for _, v in prometheus.query(with_values(expr, "60s")))


def test_no_rule_fails(prometheus):
    groups = httpx.get(f"{prometheus.url}/api/v1/rules", timeout=20).json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 20
    assert [rule for rule in rules if rule["health"] == "err"] == []


def test_the_page_is_what_promtool_calls_clean(server):
    page = httpx.get(f"{server.base_url}/metrics", timeout=20).content
    done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True)
    complaints = done.stdout.decode() + done.stderr.decode()
    assert "error" not in complaints.lower()


def test_the_time_before_the_first_token_is_told_apart(server, collector):
    """Of the engine's own records, in a process that sends its last traces before it ends."""
    server.stop()
    spans = collector.spans()
    sequences = [span for span in spans if span.name == "generate"]
    assert len(sequences) >= NUM_REQUESTS // 2
    by_parent: dict[bytes, dict[str, float]] = {}
    for span in spans:
        took_s = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
        assert took_s >= 0
        by_parent.setdefault(span.parent_span_id, {})[span.name] = took_s
    phases = [(span, by_parent.get(span.span_id, {})) for span in sequences]
    complete = [(span, took) for span, took in phases if "decode" in took]
    assert complete
    for span, took in complete:
        has_adapter = bool(attributes(span)["loraplex.adapter_ids"])
        assert set(took) - {"load_adapter"} == {"queue", "prefill", "decode"}
        assert ("load_adapter" in took) == has_adapter
        # Each begins with the one before it, and the API hears of a token after it was made.
        whole_s = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
        assert sum(took.values()) <= whole_s + 1e-4
    assert any(took.get("load_adapter", 0) > 0 for _, took in complete)


def test_its_log_is_json_with_one_line_for_each_answer(server):
    written = [line for line in server.log.read_text().splitlines() if line.startswith("{")]
    access = [line for line in map(json.loads, written) if line["logger"].endswith(".access")]
    ours = [line for line in access if line["path"] == "/v1/completions"]
    assert len(ours) == NUM_REQUESTS + 6
    assert len({line["request_id"] for line in ours}) == len(ours)
    assert {line["tenant"] for line in ours if line["status"] == 200} == {"t0", "t1", "t2"}
