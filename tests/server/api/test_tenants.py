"""Whose account a request runs on, and what one account may have waiting and spend."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from loraplex_scheduler.plan import EndEvent, FinishReason, SampledToken, TokenEvent
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.api.errors import (
    InvalidRequest,
    QuotaExceeded,
    QuotaTooSmall,
    TenantQueueFull,
)
from loraplex_server.api.job import Job, Terms
from loraplex_server.api.tenant_accounts import TenantAccounts
from loraplex_server.engine.messages import EngineState
from loraplex_server.text.assembler import TextOptions
from tests.server.api.conftest import BASE, running_server, wait_until

BODY = {"model": BASE, "prompt": "abcdef", "max_tokens": 4}


def post(server, tenant: str | None, body: dict, path: str = "/v1/completions") -> httpx.Response:
    headers = {} if tenant is None else {"x-tenant": tenant}
    return httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=20)


def make_job(tenant: str = "a", *, prompts=((1, 2, 3),), n: int = 1, max_tokens: int = 7) -> Job:
    sampling = SamplingParams(max_tokens=max_tokens)
    return Job("j", "tiny-base", prompts, n, sampling, TextOptions(), (), Terms(tenant=tenant))


def token() -> TokenEvent:
    return TokenEvent("j", SampledToken(5))


def test_the_header_names_the_tenant_where_the_server_is_told_so(server, tmp_path, vocabulary):
    assert post(server, "gold", BODY).status_code == 200
    assert server.engine.submitted[0].tenant == ""
    with running_server(tmp_path, vocabulary, tenant_header="x-tenant") as trusting:
        for tenant in ("gold", None, "org:7/team@x.y_z-1"):
            assert post(trusting, tenant, BODY).status_code == 200
        chat = {"model": BASE, "messages": [{"role": "user", "content": "x"}]}
        assert post(trusting, "chat", chat, "/v1/chat/completions").status_code == 200
        tenants = [request.tenant for request in trusting.engine.submitted]
    assert tenants == ["gold", "", "org:7/team@x.y_z-1", "chat"]


@pytest.mark.parametrize("value", ["", "a b", "x" * 65, "a,b", 'a"b', "caf\xe9"])
def test_a_tenant_that_cannot_be_one_is_refused_and_never_mended(tmp_path, vocabulary, value):
    with running_server(tmp_path, vocabulary, tenant_header="x-tenant") as server:
        answer = httpx.post(
            f"{server.url}/v1/completions", json=BODY, headers={"x-tenant": value.encode("latin-1")}
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_tenant")
        assert server.engine.submitted == []


def test_a_client_cannot_add_its_own_header_to_the_gateways(tmp_path, vocabulary):
    with running_server(tmp_path, vocabulary, tenant_header="x-tenant") as server:
        headers = [("x-tenant", "gold"), ("X-Tenant", "free")]
        answer = httpx.post(f"{server.url}/v1/completions", json=BODY, headers=headers)
    assert answer.json()["error"]["code"] == "invalid_tenant"


def test_one_tenants_full_queue_leaves_room_for_others(tmp_path, vocabulary):
    settings = {"tenant_header": "x-tenant", "max_queued_per_tenant": 2}
    reason = 'loraplex_requests_rejected_total{reason="tenant_queue_full"}'
    with running_server(tmp_path, vocabulary, **settings) as server, ThreadPoolExecutor() as pool:
        # Nobody gets a first token before it is opened.
        server.engine.gate, server.engine.hold_after = threading.Event(), 0
        waiting = pool.submit(post, server, "busy", BODY | {"n": 2, "max_tokens": 1})
        wait_until(lambda: len(server.engine.submitted) == 2)
        refused = post(server, "busy", BODY)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["code"] == "tenant_queue_full"
        assert server.metric(reason) == 1
        other = pool.submit(post, server, "other", BODY | {"max_tokens": 1})
        wait_until(lambda: len(server.engine.submitted) == 3)
        server.engine.gate.set()
        assert other.result().status_code == 200
        assert waiting.result().status_code == 200
        assert post(server, "busy", BODY | {"max_tokens": 1}).status_code == 200
        never = post(server, "busy", BODY | {"n": 3})
    assert (never.status_code, never.json()["error"]["param"]) == (400, "n")


def test_who_has_a_first_token_waits_no_more():
    accounts = TenantAccounts(max_queued=2, clock=lambda: 0.0)
    bill = accounts.open(make_job(n=2))
    with pytest.raises(TenantQueueFull, match="2 of your sequences wait"):
        accounts.check_room("a", 1)
    accounts.check_room("b", 2)
    bill.book(0, token())
    bill.book(0, token())
    accounts.check_room("a", 1)
    with pytest.raises(TenantQueueFull):
        accounts.check_room("a", 2)
    bill.book(1, EndEvent("j", FinishReason.CANCELLED))
    bill.close()
    accounts.check_room("a", 2)
    with pytest.raises(InvalidRequest, match="one tenant may have 2"):
        accounts.check_room("a", 3)


def test_a_bill_that_ends_early_leaves_nobody_waiting():
    accounts = TenantAccounts(max_queued=1, clock=lambda: 0.0)
    accounts.open(make_job()).close()
    accounts.check_room("a", 1)


def test_what_was_charged_and_not_used_is_given_back():
    # 3 of the prompt and twice 7 of the answers are charged, 3 + 2 are used.
    accounts = TenantAccounts(tokens_per_minute=17, clock=lambda: 0.0)
    bill = accounts.open(make_job(n=2))
    with pytest.raises(QuotaExceeded):
        accounts.open(make_job(max_tokens=1))
    bill.book(0, token())
    bill.book(1, token())
    bill.book(1, EndEvent("j", FinishReason.CANCELLED))
    bill.close()
    accounts.open(make_job(max_tokens=9))
    with pytest.raises(QuotaExceeded):
        accounts.open(make_job(prompts=((1,),), max_tokens=1))


def test_a_request_that_got_nothing_pays_nothing():
    accounts = TenantAccounts(tokens_per_minute=10, clock=lambda: 0.0)
    bill = accounts.open(make_job())
    bill.book(0, EndEvent("j", FinishReason.REJECTED, retry_after_s=1.0))
    bill.close()
    accounts.open(make_job())


def test_a_prompt_is_paid_for_when_one_of_its_samples_began():
    accounts = TenantAccounts(tokens_per_minute=20, clock=lambda: 0.0)
    bill = accounts.open(make_job(prompts=((1, 2, 3), (4, 5)), n=2, max_tokens=1))
    bill.book(3, token())
    bill.close()  # 2 and 1 of 9 were used
    accounts.open(make_job(max_tokens=14))
    with pytest.raises(QuotaExceeded):
        accounts.open(make_job(prompts=((1,),), max_tokens=1))


def test_the_wait_that_is_asked_for_is_enough_and_not_too_long():
    now = [0.0]
    accounts = TenantAccounts(tokens_per_minute=60, clock=lambda: now[0])
    accounts.open(make_job(max_tokens=57))
    with pytest.raises(QuotaExceeded, match="10 tokens") as caught:
        accounts.open(make_job(max_tokens=7))
    assert caught.value.retry_after_s == pytest.approx(10.0)
    accounts.open(make_job("b", max_tokens=57))
    now[0] = 9.9
    with pytest.raises(QuotaExceeded):
        accounts.open(make_job(max_tokens=7))
    now[0] = 10.01
    accounts.open(make_job(max_tokens=7))


def test_what_a_minute_never_gives_is_refused_for_good():
    accounts = TenantAccounts(tokens_per_minute=9, clock=lambda: 0.0)
    with pytest.raises(QuotaTooSmall, match="may need 10 tokens"):
        accounts.open(make_job())


def test_a_spent_quota_is_a_429_for_that_tenant_alone(tmp_path, vocabulary):
    settings = {"tenant_header": "x-tenant", "tenant_tokens_per_minute": 300}
    reason = 'loraplex_requests_rejected_total{reason="quota_exceeded"}'
    body = {"model": BASE, "prompt": "a", "max_tokens": 199, "ignore_eos": True}
    with running_server(tmp_path, vocabulary, **settings) as server:
        assert post(server, "a", body).status_code == 200
        refused = post(server, "a", body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_exceeded")
        # 100 of 300 tokens are left, 100 are missing, and 5 come each second.
        assert 15 <= int(refused.headers["retry-after"]) <= 20
        assert 15_000 < int(refused.headers["retry-after-ms"]) <= 20_000
        assert server.metric(reason) == 1
        assert post(server, "b", body).status_code == 200
        assert post(server, "a", BODY).status_code == 200
        never = post(server, "c", body | {"n": 2})
        assert (never.status_code, never.json()["error"]["code"]) == (400, "quota_too_small")


def test_an_engine_that_is_down_gives_the_tokens_back(tmp_path, vocabulary):
    body = {"model": BASE, "prompt": "a", "max_tokens": 199}
    settings = {"tenant_tokens_per_minute": 200, "max_queued_per_tenant": 1}
    with running_server(tmp_path, vocabulary, **settings) as server:
        server.engine.state = EngineState.RESTARTING
        assert post(server, None, body).status_code == 503
        server.engine.state = EngineState.READY
        assert post(server, None, body).status_code == 200
