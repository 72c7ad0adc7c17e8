from __future__ import annotations

import httpx
import pytest

from loraplex_server.engine.messages import EngineState, EngineStats
from tests.server.api.conftest import BASE, make_adapter


def prefetch(server, name: str) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/adapters/{name}/prefetch", timeout=20)


def test_a_hint_reaches_the_engine_and_leaves_no_lease(server, adapter):
    adapter_id = server.catalog.get(adapter).id
    answer = prefetch(server, adapter)
    assert answer.status_code == 202
    assert answer.json() == {
        "object": "adapter.prefetch",
        "name": adapter,
        "id": adapter_id,
        "tier": "disk",
    }
    [manifest] = server.engine.prefetched
    assert manifest.adapter_id == adapter_id
    assert server.catalog.num_leases(adapter_id) == 0
    assert prefetch(server, adapter.replace("/", "%2F")).status_code == 202


def test_it_says_how_near_the_adapter_is_and_so_does_its_record(server, adapter):
    i = server.catalog.get(adapter).id
    snapshots = {
        "resident": EngineStats(resident={i: 2}, host_adapters=(i,)),
        "loading": EngineStats(loading=(i,), host_adapters=(i,)),
        "host": EngineStats(host_adapters=(i,)),
    }
    for tier, stats in snapshots.items():
        server.engine.stats = stats
        assert prefetch(server, adapter).json()["tier"] == tier
        assert httpx.get(f"{server.url}/v1/adapters/{adapter}").json()["state"] == tier
        [listed] = httpx.get(f"{server.url}/v1/adapters").json()["data"]
        assert listed["state"] == tier


def test_only_adapters_can_be_prefetched(server):
    unknown = prefetch(server, "nobody")
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "adapter_not_found"
    base = prefetch(server, BASE)
    assert base.status_code == 400
    assert "base model" in base.json()["error"]["message"]
    assert server.engine.prefetched == []


def test_a_hint_to_an_engine_that_is_down_is_not_lost_in_silence(server, adapter):
    server.engine.state = EngineState.RESTARTING
    answer = prefetch(server, adapter)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
    assert server.catalog.num_leases(server.catalog.get(adapter).id) == 0


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_an_adapters_name_may_end_like_the_path(server, tmp_path, method):
    server.upload("team/prefetch", make_adapter(tmp_path / "a"))
    answer = httpx.request(method, f"{server.url}/v1/adapters/team/prefetch")
    assert (answer.status_code, answer.json()["name"]) == (200, "team/prefetch")
