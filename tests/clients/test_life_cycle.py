"""The SDK's calls on versions, settings and deletion: what is sent, on either client."""

from __future__ import annotations

import json

import httpx
import pytest

from loraplex import ConflictError, UsageError
from tests.clients.test_upload import RECORD


@pytest.fixture
def recorded():
    """Requests, and a handler that answers each with a record."""
    requests: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200, json={**RECORD, "version": 2, "pinned": True})

    return requests, handler


async def test_a_fetch_names_its_source(on_client, recorded):
    requests, handler = recorded
    await on_client(
        handler,
        lambda c: c.adapters.fetch(
            "a", "https://h/x.zip", sha256="0" * 64, replace=True, ttl_s=None
        ),
    )
    assert json.loads(requests[0].content) == {
        "name": "a",
        "source": "https://h/x.zip",
        "sha256": "0" * 64,
        "replace": True,
        "ttl_s": None,
    }


async def test_a_rollback_names_a_version_or_an_id(on_client, recorded):
    requests, handler = recorded
    adapter = await on_client(handler, lambda c: c.adapters.rollback("a/b", version=1))
    assert (adapter.version, adapter.current) == (2, True)
    await on_client(handler, lambda c: c.adapters.rollback("a/b", adapter_id="sha256:0"))
    assert [json.loads(r.content) for r in requests] == [{"version": 1}, {"id": "sha256:0"}]
    assert requests[0].url.raw_path == b"/v1/adapters/a%2Fb/rollback"
    with pytest.raises(UsageError):
        await on_client(handler, lambda c: c.adapters.rollback("a"))


async def test_only_given_settings_are_sent(on_client, recorded):
    requests, handler = recorded
    await on_client(handler, lambda c: c.adapters.change("a", ttl_s=None))
    await on_client(handler, lambda c: c.adapters.pin("a"))
    await on_client(handler, lambda c: c.adapters.unpin("a"))
    assert [r.method for r in requests] == ["PATCH"] * 3
    bodies = [json.loads(r.content) for r in requests]
    assert bodies == [{"ttl_s": None}, {"pinned": True}, {"pinned": False}]


async def test_versions_are_listed_page_by_page(on_client):
    def handler(request):
        after = request.url.params.get("after")
        first = {**RECORD, "version": 1 if after else 2}
        return httpx.Response(
            200, json={"data": [first], "has_more": not after, "last": first["version"]}
        )

    found = await on_client(handler, lambda c: c.adapters.versions("a", page_size=1))
    assert [v.version for v in found] == [2, 1]


async def test_a_delete_says_how_and_reads_what_was_freed(on_client):
    def handler(request):
        assert dict(request.url.params) == {"mode": "cancel", "timeout_s": "2.5"}
        freed = {"pool_bytes": 1, "host_bytes": 2, "disk_bytes": 3}
        body = {"name": "a", "id": "sha256:0", "deleted": True, "freed": freed}
        return httpx.Response(200, json=body)

    deleted = await on_client(
        handler, lambda c: c.adapters.delete("a", mode="cancel", timeout_s=2.5)
    )
    assert (deleted.freed.pool_bytes, deleted.freed.disk_bytes) == (1, 3)


async def test_a_conflict_is_not_sent_again(on_client, sleeps):
    calls = []

    def handler(request):
        calls.append(request)
        return httpx.Response(409, json={"error": {"message": "no", "current_id": "sha256:1"}})

    with pytest.raises(ConflictError):
        await on_client(handler, lambda c: c.adapters.pin("a"))
    assert len(calls) == 1


async def test_a_judgement_is_read(on_client, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")

    def handler(request):
        assert request.url.path == "/v1/adapters/validate"
        entry = {"subject": "r", "verdict": "refused", "detail": "why", "kind": "field"}
        return httpx.Response(200, json={"valid": False, "reasons": ["no"], "report": [entry]})

    found = await on_client(handler, lambda c: c.adapters.validate(tmp_path))
    assert (found.valid, found.reasons, found.report[0].detail) == (False, ["no"], "why")
