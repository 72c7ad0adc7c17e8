"""Resources beside generation and adapters: what is sent and what is read, on either client."""

from __future__ import annotations

import json
import sys

import httpx
import openai
import pytest

from loraplex import AsyncClient, Client, UsageError
from tests.clients.test_cli_ledger import ENTRY, RECORD
from tests.clients.test_client import CHAT, COMPLETION, Script, ok
from tests.support.http_server import Reply, serve

KEY = {"object": "key", "id": "key_1", "name": "ci", "role": "user", "tenant": "acme"}
KEY = {**KEY, "created": 1, "expires": None, "last_used": None}


async def test_a_key_is_made_listed_and_revoked(on_client):
    made = {**KEY, "secret": "lp-secret"}
    script = Script(ok(made), ok({"data": [KEY], "has_more": False, "last": "key_1"}))
    key = await on_client(script.handler, lambda c: c.keys.create("ci", role="user", tenant="acme"))
    assert (key.secret, key.expires) == ("lp-secret", None)
    assert json.loads(script.requests[0].content) == {
        "name": "ci",
        "role": "user",
        "tenant": "acme",
    }
    assert [k.id for k in await on_client(script.handler, lambda c: c.keys.list())] == ["key_1"]
    gone = Script(ok({"object": "key.deleted", "id": "key_1", "deleted": True}))
    assert (await on_client(gone.handler, lambda c: c.keys.revoke("key_1"))).deleted
    assert (gone.requests[0].method, gone.requests[0].url.path) == ("DELETE", "/v1/keys/key_1")


async def test_usage_and_audit_send_only_what_is_asked_for(on_client):
    script = Script(*[ok({"data": [body], "has_more": False}) for body in (RECORD, ENTRY)])
    [record] = await on_client(
        script.handler, lambda c: c.usage.list(start=5, bucket="day", page_size=7)
    )
    assert (record.adapter, record.cached_tokens) == (None, 4)
    [entry] = await on_client(script.handler, lambda c: c.audit.list(subject="acme/sql"))
    assert (entry.action, entry.details) == ("adapter.create", {"bytes": 5})
    assert [dict(request.url.params) for request in script.requests] == [
        {"limit": "7", "start": "5", "bucket": "day"},
        {"limit": "100", "subject": "acme/sql"},
    ]


async def test_embeddings_are_read_in_their_order(on_client):
    data = [{"object": "embedding", "index": i, "embedding": [i, 0.5]} for i in range(2)]
    usage = {"prompt_tokens": 4, "total_tokens": 4}
    script = Script(ok({"object": "list", "model": "m", "data": data, "usage": usage}))
    found = await on_client(
        script.handler, lambda c: c.embeddings.create(model="m", input=["a", "b"])
    )
    assert json.loads(script.requests[0].content) == {"model": "m", "input": ["a", "b"]}
    assert (found.vectors, found.usage.total_tokens) == ([[0, 0.5], [1, 0.5]], 4)


async def test_text_becomes_tokens_and_tokens_text(on_client):
    told = {"count": 2, "max_model_len": 9, "tokens": [5, 6], "token_strs": None}
    script = Script(ok(told), ok(told), ok({"prompt": "ab"}))
    assert (await on_client(script.handler, lambda c: c.tokenize("ab"))).tokens == [5, 6]
    turns = [{"role": "user", "content": "ab"}]
    await on_client(script.handler, lambda c: c.tokenize(messages=turns, model="m"))
    assert await on_client(script.handler, lambda c: c.detokenize([5, 6])) == "ab"
    assert [json.loads(request.content) for request in script.requests] == [
        {"prompt": "ab"},
        {"model": "m", "messages": turns},
        {"tokens": [5, 6]},
    ]


async def test_several_models_are_asked_in_place_of_one(on_client):
    choices = [{**COMPLETION["choices"][0], "model": name} for name in ("a", "b")]
    script = Script(ok({**COMPLETION, "choices": choices}))
    answer = await on_client(
        script.handler, lambda c: c.completions.create(models=["a", "b"], prompt="x")
    )
    assert json.loads(script.requests[0].content) == {"models": ["a", "b"], "prompt": "x"}
    assert [choice.model for choice in answer.choices] == ["a", "b"]


async def test_tool_calls_are_read_and_go_back(on_client):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    script = Script(ok({**CHAT, "choices": [choice]}), ok(CHAT))
    answer = await on_client(script.handler, lambda c: c.chat.create(model="m", messages=[]))
    assert (answer.text, answer.tool_calls[0].function.name) == ("", "add")
    back = [answer.choices[0].message, {"role": "tool", "tool_call_id": "c1", "content": "3"}]
    await on_client(script.handler, lambda c: c.chat.create(model="m", messages=back))
    sent = json.loads(script.requests[1].content)["messages"]
    assert sent[0] == {"role": "assistant", "tool_calls": [call]}


async def test_a_server_that_drains_is_not_ready_and_no_error(on_client):
    error = {"error": {"message": "the server is stopping", "code": "server_stopping"}}
    script = Script(httpx.Response(503, json=error), ok({"status": "ok"}))
    ready = await on_client(script.handler, lambda c: c.ready())
    assert (ready.is_ok, ready.status) == (False, "the server is stopping")
    assert (await on_client(script.handler, lambda c: c.ready())).is_ok


async def test_a_model_is_deleted_as_openai_would(on_client):
    script = Script(ok({"id": "team/a", "object": "model", "deleted": True}))
    assert (await on_client(script.handler, lambda c: c.models.delete("team/a"))).deleted
    assert script.requests[0].url.raw_path == b"/v1/models/team%2Fa"


def test_openai_gets_the_same_settings():
    client = Client(
        base_url="http://here:1", api_key="k", timeout=7.0, default_headers={"X-Tenant": "t"}
    )
    other = client.openai(max_retries=5)
    assert isinstance(other, openai.OpenAI)
    assert (str(other.base_url), other.api_key) == ("http://here:1/v1/", "k")
    assert (other.timeout, other.max_retries) == (7.0, 5)
    assert other.default_headers["X-Tenant"] == "t"
    assert "loraplex" not in other.default_headers["User-Agent"]
    assert isinstance(AsyncClient().openai(), openai.AsyncOpenAI)


def test_openai_talks_to_a_real_server(tiny_server):
    with Client(base_url=tiny_server.base_url) as client, client.openai() as other:
        answer = other.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=3
        )
    assert answer.usage.completion_tokens <= 3


def test_openai_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with Client() as client, pytest.raises(UsageError, match="pip install openai"):
        client.openai()


@pytest.mark.parametrize(
    ("client_type", "http_type"), [(Client, httpx.Client), (AsyncClient, httpx.AsyncClient)]
)
def test_a_proxy_beside_a_whole_httpx_client_is_refused(client_type, http_type):
    with pytest.raises(UsageError, match="give the proxy to your own http_client"):
        client_type(http_client=http_type(), proxy="http://localhost:3128")


def test_requests_go_through_a_proxy():
    with (
        serve(lambda received: Reply({"status": "ok"})) as proxy,
        Client(base_url="http://nowhere.invalid", proxy=proxy.url) as client,
    ):
        assert client.health().is_ok
    assert proxy.requests[0].headers["host"] == "nowhere.invalid"
