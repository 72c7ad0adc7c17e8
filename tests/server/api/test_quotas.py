from __future__ import annotations

import httpx
import pytest

from loraplex_server.api.errors import QuotaExceeded, RequestQuotaExceeded
from loraplex_server.api.rate_limit import RateLimit
from loraplex_server.api.tenant_accounts import TenantAccounts
from tests.server.api.conftest import make_adapter
from tests.server.api.test_tenants import make_job
from tests.support.keyed_server import keyed_server


def limits_of(answer: httpx.Response) -> dict[str, str]:
    prefix = "x-ratelimit-"
    return {n.removeprefix(prefix): v for n, v in answer.headers.items() if n.startswith(prefix)}


def test_answers_tell_of_the_limits_as_openais_do(tmp_path, vocabulary):
    settings = {
        "tenant_requests_per_minute": {"*": 2, "zeta": 0},
        "tenant_tokens_per_minute": {"acme": 600},
    }
    with keyed_server(tmp_path, vocabulary, **settings) as keyed:
        for left in ("1", "0"):
            answer = keyed.generate("acme-app", "tiny-base", ignore_eos=True)
            assert answer.status_code == 200
            limits = limits_of(answer)
            assert (limits["limit-requests"], limits["limit-tokens"]) == ("2", "600")
            assert limits["remaining-requests"] == left
            assert 570 < int(limits["remaining-tokens"]) < 600
            assert limits["reset-requests"].endswith("s")
        refused = keyed.generate("acme-up", "tiny-base")
        assert refused.json()["error"]["code"] == "request_quota_exceeded"
        assert (refused.status_code, limits_of(refused)["remaining-requests"]) == (429, "0")
        # One of two requests a minute comes back in half a minute.
        assert 20 <= int(refused.headers["retry-after"]) <= 30
        for _ in range(4):
            assert limits_of(keyed.generate("zeta-app", "tiny-base")) == {}
        assert limits_of(keyed["acme-app"].get("/v1/models")) == {}


def test_after_the_wait_that_was_asked_for_the_request_passes():
    now = [0.0]
    accounts = TenantAccounts(requests_per_minute=3, clock=lambda: now[0])
    for _ in range(3):
        accounts.open(make_job())
    with pytest.raises(RequestQuotaExceeded) as caught:
        accounts.open(make_job())
    assert caught.value.retry_after_s == pytest.approx(20.0)
    accounts.open(make_job("b"))
    now[0] = caught.value.retry_after_s + 1e-6
    accounts.open(make_job())
    with pytest.raises(RequestQuotaExceeded):
        accounts.open(make_job())


def test_a_request_that_is_refused_for_its_tokens_is_no_request():
    accounts = TenantAccounts(requests_per_minute=2, tokens_per_minute=10, clock=lambda: 0.0)
    accounts.open(make_job())
    for _ in range(5):
        with pytest.raises(QuotaExceeded):
            accounts.open(make_job())
    assert accounts.limit_headers("a")["x-ratelimit-remaining-requests"] == "1"


@pytest.mark.parametrize(
    ("spent", "left", "reset"),
    [(0, "60", "0s"), (1, "59", "1s"), (60, "0", "1m0s"), (45, "15", "45s")],
)
def test_what_is_left_and_when_all_of_it_is_back(spent, left, reset):
    limit = RateLimit("tokens", 60)
    if spent:
        assert limit.try_spend("a", spent, 0.0) is None
    assert limit.headers("a", 0.0) == {
        "x-ratelimit-limit-tokens": "60",
        "x-ratelimit-remaining-tokens": left,
        "x-ratelimit-reset-tokens": reset,
    }


def test_a_tenant_has_so_many_adapters_and_bytes_and_no_more(tmp_path, vocabulary):
    folders = [make_adapter(tmp_path / f"a{seed}", seed=seed) for seed in range(4)]
    settings = {"tenant_max_adapters": {"acme": 2}, "tenant_max_adapter_bytes": {"zeta": 12_000}}
    with keyed_server(tmp_path / "data", vocabulary, **settings) as keyed:
        assert keyed.upload("acme-up", "a", folders[0]).status_code == 201
        assert keyed.upload("acme-up", "b", folders[1]).status_code == 201
        refused = keyed.upload("acme-up", "c", folders[2])
        assert (refused.status_code, refused.json()["error"]["code"]) == (
            403,
            "adapter_quota_exceeded",
        )
        assert keyed.upload("root", "acme/c", folders[2]).status_code == 403
        assert keyed.upload("acme-up", "b", folders[2], replace="true").status_code == 201
        assert keyed["acme-up"].delete("/v1/adapters/a").status_code == 200
        assert keyed.upload("acme-up", "c", folders[2]).status_code == 201
        first = keyed.upload("zeta-up", "a", folders[0])
        assert first.status_code == 201, first.text
        assert 4_000 < first.json()["size_bytes"] < 12_000 < 3 * first.json()["size_bytes"]
        answers = [
            keyed.upload("zeta-up", "a", folder, replace="true").status_code
            for folder in folders[1:]
        ]
        assert answers[-1] == 403
        assert keyed.upload("root", "shared", folders[3]).status_code == 201
