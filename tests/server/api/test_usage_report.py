"""What is billed is what answers said, by tenant and adapter."""

from __future__ import annotations

import asyncio
import json
import threading

import httpx

from loraplex_server.tenants.usage_store import UsageQuery
from tests.server.api.conftest import BASE, make_adapter, running_server, wait_until
from tests.support.keyed_server import keyed_server


def report(client: httpx.Client, **query: object) -> dict[tuple, tuple]:
    answer = client.get("/v1/usage", params={"bucket": "all", **query})
    assert answer.status_code == 200, answer.text
    numbers = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")
    return {
        (row["tenant"], row["adapter"]): tuple(row[name] for name in numbers)
        for row in answer.json()["data"]
    }


def usage_of(answer: httpx.Response) -> tuple[int, int, int]:
    usage = answer.json()["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return usage["prompt_tokens"], cached, usage["completion_tokens"]


def test_the_ledger_has_what_the_answers_said(tmp_path, vocabulary):
    with keyed_server(tmp_path / "data", vocabulary) as keyed:
        keyed.server.engine.num_cached = lambda request: 2
        keyed.upload("acme-up", "pirate", make_adapter(tmp_path / "pirate"))
        keyed.upload("root", "sql", make_adapter(tmp_path / "sql", seed=1))
        mixture = [{"name": "pirate"}, {"name": "sql"}]
        expected: dict[tuple, tuple] = {}
        for account, person, fields in (
            (("acme", "acme/pirate"), "acme-app", {"model": "pirate"}),
            (("acme", "acme/pirate"), "acme-up", {"model": "acme/pirate", "n": 3}),
            (("acme", None), "acme-app", {"model": BASE, "prompt": ["ab", "cde"], "n": 2}),
            (("zeta", "sql"), "zeta-app", {"model": "sql"}),
            (("acme", "acme/pirate,sql"), "acme-app", {"model": BASE, "adapters": mixture}),
        ):
            answer = keyed.generate(person, **fields)
            assert answer.status_code == 200, answer.text
            before = expected.get(account, (0, 0, 0, 0))
            now = (1, *usage_of(answer))
            expected[account] = tuple(a + b for a, b in zip(before, now, strict=True))
        assert report(keyed["root"]) == expected
        acme = {account: used for account, used in expected.items() if account[0] == "acme"}
        assert report(keyed["acme-app"]) == acme
        assert report(keyed["acme-app"], tenant="acme", adapter="pirate").keys() == {
            ("acme", "acme/pirate")
        }
        assert report(keyed["root"], adapter=BASE).keys() == {("acme", None)}
        refused = keyed["acme-app"].get("/v1/usage", params={"tenant": "zeta"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "tenant_forbidden")
        wrong = keyed["root"].get("/v1/usage", params={"after": "x"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "invalid_cursor")


def test_a_stream_is_billed_while_it_runs_and_when_its_client_leaves(tmp_path, vocabulary):
    settings = {"tenant_header": "x-tenant"}
    with running_server(tmp_path, vocabulary, **settings) as server, server.http() as http:
        server.engine.gate = threading.Event()
        body = {"model": BASE, "prompt": "abc", "max_tokens": 200, "ignore_eos": True}
        with http.stream(
            "POST", "/v1/completions", json={**body, "stream": True}, headers={"x-tenant": "gold"}
        ) as stream:
            lines = (line for line in stream.iter_lines() if line.startswith("data: {"))
            json.loads(next(lines).removeprefix("data: "))
            requests, prompt, cached, generated = report(http)["gold", None]
            assert (requests, prompt, cached) == (1, 3, 0)
            assert 1 <= generated < 200
        wait_until(lambda: server.engine.num_running == 0)
        final = report(http)["gold", None]
        assert final[:3] == (1, 3, 0)
        assert generated <= final[3] < 200


def test_what_was_refused_is_no_use(tmp_path, vocabulary):
    with running_server(tmp_path, vocabulary, tenant_tokens_per_minute=10) as server:
        body = {"model": BASE, "prompt": "abc", "max_tokens": 100}
        assert server.post("/v1/completions", body).status_code == 400
        with server.http() as http:
            assert report(http) == {}


def test_the_rest_is_written_when_the_server_stops(tmp_path, vocabulary):
    with running_server(tmp_path, vocabulary) as server:
        server.post("/v1/completions", {"model": BASE, "prompt": "abc", "max_tokens": 2})
        desk = server.app.state.tenants
        asyncio.run_coroutine_threadsafe(desk.close(), server.loop).result(timeout=20)
        (row,) = desk.usage.report(UsageQuery(), limit=9)
        assert (row.tenant, row.adapter, row.amounts) == ("", "", (1, 3, 0, 2))
