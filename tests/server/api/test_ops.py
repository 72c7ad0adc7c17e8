from __future__ import annotations

import time

import httpx
from prometheus_client.parser import text_string_to_metric_families

from loraplex_server.api.engine_metrics import adapter_room, kv_usage
from loraplex_server.engine.messages import EngineStats
from tests.server.api.conftest import BASE, make_adapter


def labels_of(server, name: str) -> dict[str, str]:
    text = httpx.get(f"{server.url}/metrics").text
    [sample] = [
        sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    ]
    assert abs(sample.value - time.time()) < 60
    return sample.labels


def test_the_pool_says_who_holds_its_pages(server, client, adapter):
    adapter_id = server.catalog.get(adapter).id
    client.completions.create(model=adapter, prompt="hello")
    server.engine.stats = EngineStats(
        pages_kv=3, pages_adapters=2, pages_free=59, resident={adapter_id: 2}
    )
    assert httpx.get(f"{server.url}/v1/pool").json() == {
        "num_pages": 64,
        "page_bytes": 4096,
        "page_tokens": 16,
        "kv": 3,
        "adapters": 2,
        "free": 59,
        "resident_adapters": [{"id": adapter_id, "name": adapter, "pages": 2}],
    }
    assert server.metric('loraplex_pool_pages{use="adapters"}') == 2
    assert server.metric("loraplex_resident_adapters") == 1


def test_requests_are_counted_and_timed(server, client):
    stop = 'loraplex_requests_finished_total{outcome="stop"}'
    first = "loraplex_time_to_first_token_seconds_count"
    between = "loraplex_inter_token_latency_seconds_count"
    e2e = "loraplex_e2e_request_latency_seconds_count"
    names = (stop, first, e2e)
    before = {name: server.metric(name) for name in (*names, between)}
    server.engine.step_s = 0.005
    client.completions.create(model=BASE, prompt="hello world", n=2)
    after = {name: server.metric(name) for name in (*names, between)}
    assert [after[name] - before[name] for name in names] == [2, 2, 2]
    assert after[between] - before[between] == 4


def test_routers_see_which_adapters_are_ready_and_which_are_waited_for(server, client, tmp_path):
    ids = {}
    for seed, name in enumerate(("ready", "loading", "queued")):
        ids[name] = server.upload(name, make_adapter(tmp_path / name, seed=seed)).json()["id"]
        client.completions.create(model=name, prompt="x")
    server.engine.stats = EngineStats(
        num_running=1,
        num_waiting=2,
        pages_kv=8,
        pages_free=20,
        pages_adapters=4,
        resident={ids["ready"]: 4},
        loading=(ids["loading"],),
        running_adapters=(ids["ready"],),
        waiting_adapters=(ids["loading"], ids["queued"]),
    )
    labels = labels_of(server, "vllm:lora_requests_info")
    assert labels["running_lora_adapters"] == "ready"
    assert labels["waiting_lora_adapters"] == "loading,queued"
    assert labels["max_lora"] == "6"
    assert server.metric(f'vllm:num_requests_waiting{{model_name="{BASE}"}}') == 2
    assert server.metric(f'vllm:num_requests_running{{model_name="{BASE}"}}') == 1


def test_pages_of_idle_adapters_count_as_available():
    idle = EngineStats(pages_kv=10, pages_free=10, resident={"a": 20})
    assert kv_usage(idle) == 0.25
    busy = EngineStats(pages_kv=10, pages_free=10, resident={"a": 20}, running_adapters=("a",))
    assert kv_usage(busy) == 0.5
    assert kv_usage(EngineStats()) == 0.0
    assert adapter_room(idle) == 1
    assert adapter_room(EngineStats(pages_free=7)) == 7


def test_version_and_documentation_are_there(server):
    assert httpx.get(f"{server.url}/version").json()["version"]
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert "/v1/chat/completions" in paths
