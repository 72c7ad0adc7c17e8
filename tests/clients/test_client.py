from __future__ import annotations

import json

import httpx
import pytest

from loraplex import (
    APIConnectionError,
    APITimeoutError,
    AsyncClient,
    Client,
    ConflictError,
    InternalServerError,
    NotFoundError,
    RateLimitError,
    UsageError,
)

MODELS = {"object": "list", "data": [{"id": "base"}, {"id": "sql", "parent": "base"}]}
CHAT = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "sql",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Arr", "refusal": None},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
}
COMPLETION = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 1,
    "model": "base",
    "choices": [
        {"index": 1, "text": "two", "finish_reason": "length", "logprobs": None},
        {"index": 0, "text": "one", "finish_reason": "stop", "logprobs": None},
    ],
    "system_fingerprint": "f",
}


def adapter(name: str) -> dict:
    return {
        "object": "adapter",
        "name": name,
        "id": "sha256:00",
        "base_model": "base",
        "rank_max": 8,
        "target_modules": ["q_proj"],
        "size_bytes": 1,
        "pool_pages": 1,
        "created": 1,
        "state": "registered",
    }


class Script:
    """Answers each request with the next of its outcomes, and remembers the requests."""

    def __init__(self, *outcomes: httpx.Response | Exception) -> None:
        self.outcomes = list(outcomes)
        self.requests: list[httpx.Request] = []

    @property
    def handler(self):
        def handle(request: httpx.Request) -> httpx.Response:
            self.requests.append(request)
            outcome = self.outcomes.pop(0)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return handle


def ok(body: object) -> httpx.Response:
    return httpx.Response(200, json=body)


async def test_chat_sends_what_was_given_and_reads_the_answer(on_client):
    script = Script(ok(CHAT))
    answer = await on_client(
        script.handler,
        lambda client: client.chat.create(
            model="sql",
            messages=[{"role": "user", "content": "hi"}],
            temperature=0,
            top_k=5,
            seed=None,
            extra_body={"new_field": 1},
        ),
        base_url="http://there:1/v1/",
        api_key="k",
        default_headers={"X-Tenant": "t"},
    )
    [request] = script.requests
    assert (request.method, str(request.url)) == ("POST", "http://there:1/v1/chat/completions")
    assert request.headers["authorization"] == "Bearer k"
    assert request.headers["x-tenant"] == "t"
    assert request.headers["user-agent"].startswith("loraplex-python/")
    assert json.loads(request.content) == {
        "model": "sql",
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 0,
        "top_k": 5,
        "new_field": 1,
    }
    assert (answer.text, answer.usage.total_tokens) == ("Arr", 4)
    assert answer.choices[0].message.refusal is None  # a field the SDK does not know


async def test_an_answer_can_go_back_as_a_message(on_client):
    script = Script(ok(CHAT), ok(CHAT))
    first = await on_client(script.handler, lambda c: c.chat.create(model="m", messages=[]))
    message = first.choices[0].message
    await on_client(script.handler, lambda c: c.chat.create(model="m", messages=[message]))
    sent = json.loads(script.requests[1].content)["messages"]
    assert sent == [{"role": "assistant", "content": "Arr"}]


async def test_completions_take_token_ids_and_return_the_first_choice_as_text(on_client):
    script = Script(ok(COMPLETION))
    answer = await on_client(
        script.handler, lambda c: c.completions.create(model="base", prompt=[1, 2], n=2)
    )
    assert json.loads(script.requests[0].content) == {"model": "base", "prompt": [1, 2], "n": 2}
    assert answer.text == "one"


@pytest.mark.parametrize(
    ("options", "header"),
    [
        ({"model": "sql"}, "sql"),
        ({"model": "base", "lora_path": "sql"}, "sql"),
        ({"model": "base", "adapter_id": "sql"}, "sql"),
        ({"models": ["sql", "pirate"]}, None),
        ({"model": "base", "adapters": [{"name": "sql"}]}, None),
        ({"model": "sql", "extra_body": {"model": None}}, None),
        ({"model": "señor"}, None),
        ({"model": " sql"}, None),
        ({"model": "sql\r\nX-Other: 1"}, None),
        ({"model": "x" * 300}, None),
    ],
)
async def test_balancers_are_told_the_adapter_where_a_header_can_say_it(options, header, on_client):
    script = Script(ok(COMPLETION))
    await on_client(script.handler, lambda c: c.completions.create(prompt="hi", **options))
    assert script.requests[0].headers.get("x-loraplex-model") == header


async def test_models_are_listed_and_retrieved(on_client):
    script = Script(ok(MODELS), ok(MODELS["data"][1]))
    models = await on_client(script.handler, lambda c: c.models.list())
    assert [(m.id, m.parent) for m in models] == [("base", None), ("sql", "base")]
    assert (await on_client(script.handler, lambda c: c.models.retrieve("sql"))).id == "sql"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("team/sql", b"/v1/adapters/team%2Fsql"),
        ("a%2Fb?c#d", b"/v1/adapters/a%252Fb%3Fc%23d"),
        ("..", b"/v1/adapters/%2E%2E"),
        ("é é", b"/v1/adapters/%C3%A9%20%C3%A9"),
    ],
)
async def test_a_name_is_one_path_segment_whatever_it_holds(name, path, on_client):
    script = Script(ok({"name": name, "id": "sha256:00", "deleted": True}))
    await on_client(script.handler, lambda c: c.adapters.delete(name))
    assert script.requests[0].url.raw_path == path


@pytest.mark.parametrize("name", ["", "\udcff"])
async def test_a_name_that_no_request_can_carry_is_refused(name, on_client):
    with pytest.raises(UsageError):
        await on_client(Script().handler, lambda c: c.adapters.get(name))


async def test_adapters_are_listed_page_by_page(on_client):
    pages = [
        {"data": [adapter("a"), adapter("b")], "has_more": True, "last": "b"},
        {"data": [adapter("c")], "has_more": False, "last": "c"},
    ]
    script = Script(*(ok(page) for page in pages))
    found = await on_client(script.handler, lambda c: c.adapters.list(page_size=2))
    assert [item.name for item in found] == ["a", "b", "c"]
    assert [dict(r.url.params) for r in script.requests] == [
        {"limit": "2"},
        {"limit": "2", "after": "b"},
    ]


@pytest.mark.parametrize("last", [None, "a"])
async def test_a_cursor_that_does_not_move_ends_the_list(last, on_client):
    pages = [{"data": [adapter("a")], "has_more": True, "last": last}] * 2
    script = Script(*(ok(page) for page in pages))
    assert len(await on_client(script.handler, lambda c: c.adapters.list())) <= 2


async def test_the_pools_map_is_read(on_client):
    holder = {"id": "sha256:00", "name": None, "weight_pages": 2, "prefix_pages": 3, "state": "x"}
    uses = {"kv": 3, "prefix_used": 1, "prefix_idle": 2, "adapters": 2, "free": 1}
    host = {"bytes": 5, "capacity_bytes": 9, "adapters": [{"id": "sha256:00", "name": "sql"}]}
    body = {"num_pages": 9, "page_bytes": 4096, **uses, "by_adapter": [holder], "host": host}
    pool = await on_client(Script(ok(body)).handler, lambda c: c.pool())
    assert {use: getattr(pool, use) for use in uses} == uses
    assert (pool.by_adapter[0].weight_pages, pool.by_adapter[0].prefix_pages) == (2, 3)
    assert (pool.host.capacity_bytes, pool.host.adapters[0].name) == (9, "sql")


async def test_a_prefetch_says_where_the_adapter_was(on_client):
    answer = {"object": "adapter.prefetch", "name": "team/a", "id": "sha256:00", "tier": "disk"}
    script = Script(httpx.Response(202, json=answer))
    asked = await on_client(script.handler, lambda c: c.adapters.prefetch("team/a"))
    [request] = script.requests
    assert (request.method, request.url.raw_path) == (
        "POST",
        b"/v1/adapters/team%2Fa/prefetch",
    )
    assert (asked.name, asked.tier) == ("team/a", "disk")


async def test_usage_tells_cached_tokens_and_none_where_the_server_says_nothing(on_client):
    details = {"prompt_tokens_details": {"cached_tokens": 2, "audio_tokens": 0}}
    told = {**CHAT, "usage": {**CHAT["usage"], **details}}
    script = Script(ok(told), ok(CHAT))
    for expected in (2, 0):
        answer = await on_client(script.handler, lambda c: c.chat.create(model="m", messages=[]))
        assert answer.usage.cached_tokens == expected


async def test_promises_are_sent_as_they_are_given(on_client):
    script = Script(ok(COMPLETION))
    terms = {"priority": -1, "deadline_s": 10.0, "ttft_slo_s": 0.5}
    await on_client(script.handler, lambda c: c.completions.create(model="m", prompt="x", **terms))
    assert json.loads(script.requests[0].content) == {"model": "m", "prompt": "x", **terms}


async def test_an_overloaded_server_is_asked_again_when_it_said(on_client, sleeps):
    headers = {"retry-after": "3", "retry-after-ms": "2400"}
    script = Script(httpx.Response(429, headers=headers), ok(CHAT))
    answer = await on_client(script.handler, lambda c: c.chat.create(model="m", messages=[]))
    assert (answer.text, sleeps) == ("Arr", [2.4])


async def test_a_server_that_stays_overloaded_says_when_to_come_back(on_client, sleeps):
    error = {"message": "later", "code": "overloaded", "type": "rate_limit_error"}
    refused = httpx.Response(429, json={"error": error}, headers={"retry-after-ms": "750"})
    script = Script(*[refused] * 3)
    with pytest.raises(RateLimitError) as caught:
        await on_client(script.handler, lambda c: c.chat.create(model="m", messages=[]))
    assert (caught.value.code, caught.value.retry_after_s) == ("overloaded", 0.75)
    assert sleeps == [0.75, 0.75]


async def test_health_reports_a_restart_instead_of_raising(on_client, sleeps):
    restarting = httpx.Response(
        503, json={"status": "engine restarting"}, headers={"Retry-After": "1"}
    )
    health = await on_client(Script(restarting).handler, lambda c: c.health())
    assert (health.is_ok, health.status) == (False, "engine restarting")
    assert (await on_client(Script(ok({"status": "ok"})).handler, lambda c: c.health())).is_ok
    assert sleeps == []


async def test_a_busy_server_is_asked_again_when_it_says(on_client, sleeps):
    busy = httpx.Response(429, headers={"Retry-After": "3"})
    script = Script(busy, httpx.ConnectError("refused"), ok(MODELS))
    assert len(await on_client(script.handler, lambda c: c.models.list())) == 2
    assert sleeps[0] == 3
    assert 0.75 <= sleeps[1] <= 1.0


async def test_retries_end_with_the_last_error(on_client, sleeps):
    script = Script(*(httpx.Response(500) for _ in range(3)))
    with pytest.raises(InternalServerError):
        await on_client(script.handler, lambda c: c.models.list())
    assert (len(script.requests), len(sleeps)) == (3, 2)


async def test_a_wait_that_is_too_long_is_left_to_the_caller(on_client, sleeps):
    script = Script(httpx.Response(429, headers={"Retry-After": "3600"}))
    with pytest.raises(RateLimitError) as caught:
        await on_client(script.handler, lambda c: c.models.list())
    assert (caught.value.retry_after_s, sleeps) == (3600, [])


@pytest.mark.parametrize(
    ("make_outcome", "error"),
    [
        (lambda: httpx.Response(409), ConflictError),
        (lambda: httpx.Response(404), NotFoundError),
        (lambda: httpx.ReadTimeout("slow"), APITimeoutError),
    ],
)
async def test_what_would_fail_again_is_not_retried(make_outcome, error, on_client, sleeps):
    script = Script(make_outcome())
    with pytest.raises(error):
        await on_client(script.handler, lambda c: c.models.list())
    assert sleeps == []


async def test_a_deletion_whose_answer_was_lost_is_not_repeated(on_client):
    script = Script(httpx.ReadError("reset"))
    with pytest.raises(APIConnectionError, match="reset"):
        await on_client(script.handler, lambda c: c.adapters.delete("a"))


async def test_max_retries_zero_tries_once(on_client):
    script = Script(httpx.Response(503))
    with pytest.raises(InternalServerError):
        await on_client(script.handler, lambda c: c.models.list(), max_retries=0)


async def test_options_can_be_changed_for_some_calls(on_client):
    script = Script(httpx.Response(503), ok(MODELS))

    def operation(client):
        other = client.with_options(timeout=1.5, max_retries=1, headers={"X-A": "1"})
        assert client.max_retries == 2
        return other.models.list()

    await on_client(script.handler, operation)
    assert script.requests[1].headers["x-a"] == "1"
    assert script.requests[1].extensions["timeout"]["read"] == 1.5


async def test_timeouts_default_to_long_answers_and_short_connects(on_client):
    script = Script(ok(MODELS))
    await on_client(script.handler, lambda c: c.models.list())
    assert script.requests[0].extensions["timeout"] == {
        "connect": 5.0,
        "read": 600.0,
        "write": 600.0,
        "pool": 600.0,
    }


def test_settings_come_from_the_environment_when_the_client_is_made(monkeypatch):
    monkeypatch.setenv("LORAPLEX_BASE_URL", "http://elsewhere:9/")
    monkeypatch.setenv("LORAPLEX_API_KEY", "secret")
    with Client() as client:
        assert client.base_url == "http://elsewhere:9"
        assert client._headers["Authorization"] == "Bearer secret"
    with Client(base_url="http://here:1", api_key="mine") as client:
        assert client.base_url == "http://here:1"
        assert client._headers["Authorization"] == "Bearer mine"


@pytest.mark.parametrize("base_url", ["localhost:8000", "ftp://x", "http://", "http://x:port"])
def test_a_base_url_that_cannot_work_is_refused(base_url):
    with pytest.raises(UsageError, match="base URL"):
        Client(base_url=base_url)


def test_a_key_that_no_header_can_carry_is_refused_without_showing_it():
    with pytest.raises(UsageError) as caught:
        Client(api_key="se\ncret")
    assert "cret" not in str(caught.value)


async def test_a_given_http_client_stays_open_and_an_own_one_is_closed():
    with httpx.Client() as http:
        with Client(http_client=http):
            pass
        assert not http.is_closed
    client = Client()
    client.with_options(timeout=1).close()
    assert not client._http.is_closed
    client.close()
    assert client._http.is_closed
    async with AsyncClient() as other:
        pass
    assert other._http.is_closed


def test_constructor_arguments_are_keyword_only():
    with pytest.raises(TypeError):
        Client("http://here")


@pytest.mark.parametrize("status", [500, 503, 504])
async def test_a_request_the_server_calls_final_is_sent_once(status, on_client, sleeps):
    script = Script(httpx.Response(status, headers={"x-should-retry": "false"}))
    with pytest.raises(InternalServerError):
        await on_client(script.handler, lambda c: c.completions.create(model="m", prompt="x"))
    assert sleeps == []


async def test_a_request_the_server_wants_again_is_sent_again(on_client):
    script = Script(httpx.Response(409, headers={"x-should-retry": "true"}), ok(COMPLETION))
    answer = await on_client(script.handler, lambda c: c.completions.create(model="m", prompt="x"))
    assert answer.text == "one"


async def test_a_generation_that_took_too_long_is_not_started_again(on_client, sleeps):
    script = Script(httpx.Response(504))
    with pytest.raises(InternalServerError):
        await on_client(script.handler, lambda c: c.chat.create(model="m", messages=[]))
    assert sleeps == []


@pytest.mark.parametrize(
    ("error", "was_connected"),
    [(httpx.ConnectError("refused"), False), (httpx.ReadError("reset"), True)],
)
async def test_a_broken_connection_is_told_from_none(error, was_connected, on_client):
    with pytest.raises(APIConnectionError) as caught:
        await on_client(Script(error).handler, lambda c: c.models.list(), max_retries=0)
    assert caught.value.was_connected is was_connected
