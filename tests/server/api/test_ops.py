from __future__ import annotations

import time

import httpx
from prometheus_client.parser import text_string_to_metric_families

from loraplex_server.api.engine_metrics import adapter_room, kv_usage, takeable_adapters
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


def held(
    adapter_id: str | None, name: str | None, weights: int | None, prefixes: int, state: str
) -> dict[str, object]:
    return {
        "id": adapter_id,
        "name": name,
        "weight_pages": weights,
        "prefix_pages": prefixes,
        "state": state,
    }


def test_the_pool_says_who_holds_its_pages(server, client, adapter):
    adapter_id = server.catalog.get(adapter).id
    client.completions.create(model=adapter, prompt="hello")
    server.engine.stats = EngineStats(
        pages_kv=3,
        pages_prefix_used=4,
        pages_prefix_idle=5,
        pages_adapters=6,
        pages_free=46,
        prefix_pages_by_adapter={"": 2, adapter_id: 1, "sha256:left": 6},
        resident={adapter_id: 2, "sha256:big": 7},
        loading=("sha256:next",),
        host_bytes=8192,
        host_capacity_bytes=65536,
        host_adapters=(adapter_id, "sha256:next", "sha256:left"),
    )
    uses = {"kv": 3, "prefix_used": 4, "prefix_idle": 5, "adapters": 6, "free": 46}
    assert sum(uses.values()) == 64
    assert httpx.get(f"{server.url}/v1/pool").json() == {
        "num_pages": 64,
        "page_bytes": 4096,
        "page_tokens": 16,
        **uses,
        "by_adapter": [
            held(None, BASE, 0, 2, "resident"),
            held("sha256:big", None, 7, 0, "resident"),
            held("sha256:left", None, 0, 6, "host"),
            held(adapter_id, adapter, 2, 1, "resident"),
            held("sha256:next", None, None, 0, "loading"),
        ],
        "host": {
            "bytes": 8192,
            "capacity_bytes": 65536,
            "adapters": [
                {"id": adapter_id, "name": adapter},
                {"id": "sha256:next", "name": None},
                {"id": "sha256:left", "name": None},
            ],
        },
    }
    for use, pages in uses.items():
        assert server.metric(f'loraplex_pool_pages{{use="{use}"}}') == pages


def test_an_empty_pool_has_an_empty_map(server):
    shown = httpx.get(f"{server.url}/v1/pool").json()
    assert (shown["free"], shown["by_adapter"]) == (64, [])
    assert shown["host"] == {"bytes": 0, "capacity_bytes": 0, "adapters": []}


def test_tiers_and_the_prefix_cache_are_measured(server):
    server.engine.stats = EngineStats(
        resident={"a": 2, "b": 2},
        host_adapters=("a", "b", "c"),
        host_bytes=10,
        host_capacity_bytes=20,
        num_loads=4,
        load_s=0.5,
        num_host_hits=3,
        num_prefetches=2,
        num_prefix_evictions=7,
        prefix_hit_tokens=160,
        prefix_query_tokens=200,
    )
    expected = {
        "loraplex_resident_adapters": 2,
        "loraplex_host_adapters": 3,
        "loraplex_host_bytes": 10,
        "loraplex_host_capacity_bytes": 20,
        "loraplex_adapter_loads_total": 4,
        "loraplex_adapter_load_seconds_total": 0.5,
        "loraplex_adapter_host_hits_total": 3,
        "loraplex_adapter_prefetches_total": 2,
        "loraplex_prefix_evictions_total": 7,
        "loraplex_prefix_hit_tokens_total": 160,
        "loraplex_prefix_query_tokens_total": 200,
        f'vllm:prefix_cache_hits_total{{model_name="{BASE}"}}': 160,
        f'vllm:prefix_cache_queries_total{{model_name="{BASE}"}}': 200,
    }
    assert {name: server.metric(name) for name in expected} == expected


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


def test_idle_prefixes_count_as_available_and_used_ones_as_in_use():
    stats = EngineStats(pages_kv=10, pages_prefix_used=5, pages_prefix_idle=10, pages_free=5)
    assert kv_usage(stats) == 0.5
    assert kv_usage(EngineStats(pages_prefix_idle=64)) == 0.0
    full = EngineStats(resident={"a": 20}, pages_prefix_idle=60)
    assert adapter_room(full) == 4


def test_free_pages_make_room_for_adapters():
    idle = EngineStats(pages_kv=10, pages_free=10, resident={"a": 20})
    assert adapter_room(idle) == 1
    assert adapter_room(EngineStats(pages_free=7)) == 7


def test_a_pool_full_of_adapters_that_nobody_uses_can_take_others():
    full = EngineStats(resident={"a": 4, "b": 4, "c": 4})
    assert adapter_room(full) == 3
    assert takeable_adapters(full, pinned=()) == 6
    assert takeable_adapters(full, pinned={"a"}) == 5
    wanted = EngineStats(
        resident={"a": 4, "b": 4, "c": 4}, running_adapters=("b",), waiting_adapters=("c",)
    )
    assert takeable_adapters(wanted, pinned={"a"}) == 3


def test_a_name_is_ready_where_its_current_version_is(server, client, tmp_path):
    def ask():
        client.completions.create(model="moving", prompt="x")

    old = server.upload("moving", make_adapter(tmp_path / "old", seed=1)).json()["id"]
    ask()
    folder = make_adapter(tmp_path / "new", seed=2)
    new = server.upload("moving", folder, replace="true").json()["id"]
    ask()
    server.engine.stats = EngineStats(pages_free=8, resident={old: 4}, waiting_adapters=(new,))
    labels = labels_of(server, "vllm:lora_requests_info")
    assert (labels["running_lora_adapters"], labels["waiting_lora_adapters"]) == ("", "moving")
    client.completions.create(model=f"moving@{old}", prompt="x")
    server.engine.stats = EngineStats(pages_free=8, resident={old: 4, new: 4})
    assert labels_of(server, "vllm:lora_requests_info")["running_lora_adapters"] == "moving"


def test_version_and_documentation_are_there(server):
    assert httpx.get(f"{server.url}/version").json()["version"]
    paths = httpx.get(f"{server.url}/openapi.json", timeout=20).json()["paths"]
    assert "/v1/chat/completions" in paths
