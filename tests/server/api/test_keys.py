from __future__ import annotations

import time

import anthropic
import httpx
import openai
import pytest

from tests.server.api.conftest import BASE, running_server
from tests.support.keyed_server import keyed_server


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def test_the_first_key_closes_a_running_server(tmp_path, vocabulary):
    with running_server(tmp_path, vocabulary) as server:
        url = f"{server.url}/v1/keys"
        assert httpx.get(f"{server.url}/v1/models").status_code == 200
        refused = httpx.post(url, json={"name": "app", "role": "user", "tenant": "acme"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_key")
        made = httpx.post(url, json={"name": "root", "role": "admin"}).json()
        assert (made["object"], made["role"], made["tenant"]) == ("key", "admin", "")
        assert (made["expires"], made["last_used"]) == (None, None)
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        admin = bearer(made["secret"])
        wish = {"name": "app", "role": "user", "tenant": "acme", "expires_in_s": 100}
        app = httpx.post(url, json=wish, headers=admin).json()
        assert app["expires"] == app["created"] + 100
        assert httpx.get(f"{server.url}/v1/models", headers=bearer(app["secret"])).is_success
        listed = httpx.get(url, headers=admin).json()
        assert [key["id"] for key in listed["data"]] == [made["id"], app["id"]]
        assert all("secret" not in key and key["last_used"] for key in listed["data"])
        page = httpx.get(url, params={"limit": 1}, headers=admin).json()
        assert (page["has_more"], page["last"]) == (True, made["id"])
        gone = httpx.delete(f"{url}/{app['id']}", headers=admin)
        assert gone.json() == {"object": "key.deleted", "id": app["id"], "deleted": True}
        after = httpx.get(f"{server.url}/v1/models", headers=bearer(app["secret"]))
        assert after.status_code == 401
        again = httpx.delete(f"{url}/{app['id']}", headers=admin)
        assert (again.status_code, again.json()["error"]["code"]) == (404, "key_not_found")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": "a", "role": "king"}, "role"),
        ({"name": "a", "role": "user", "tenant": "a b"}, "tenant"),
        ({"name": "a", "role": "user", "tenant": "a", "expires_in_s": 0}, "expires_in_s"),
        ({"name": "a", "role": "admin", "color": "red"}, "color"),
        ({"role": "admin"}, "name"),
    ],
)
def test_a_wrong_wish_is_named(server, body, param):
    answer = httpx.post(f"{server.url}/v1/keys", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_an_expired_key_says_so(tmp_path, vocabulary):
    with keyed_server(tmp_path, vocabulary) as keyed:
        wish = {"name": "short", "role": "user", "tenant": "acme", "expires_in_s": 1}
        made = keyed["root"].post("/v1/keys", json=wish).json()
        while time.time() < made["expires"]:
            time.sleep(0.05)
        url = f"{keyed.server.url}/v1/models"
        answer = httpx.get(url, headers=bearer(made["secret"]))
        assert answer.status_code == 401
        assert "has expired" in answer.json()["error"]["message"]


def test_the_setting_is_an_admins_key_beside_the_others(tmp_path, vocabulary):
    with keyed_server(tmp_path, vocabulary, api_key="k3y") as keyed:
        for headers in (bearer("k3y"), {"x-api-key": "k3y"}):
            answer = httpx.get(f"{keyed.server.url}/v1/audit", headers=headers)
            assert answer.status_code == 200
        assert keyed["root"].get("/v1/audit").status_code == 200
        wish = {"name": "x", "role": "admin"}
        httpx.post(f"{keyed.server.url}/v1/keys", json=wish, headers=bearer("k3y"))
        assert keyed["root"].get("/v1/audit").json()["data"][0]["actor"] == "api_key"


def test_a_gateways_admin_key_may_ask_for_a_tenant_and_nobody_elses(tmp_path, vocabulary):
    with keyed_server(tmp_path, vocabulary, tenant_header="x-tenant") as keyed:
        body = {"model": BASE, "prompt": "a", "max_tokens": 1}
        for_acme = {"x-tenant": "acme"}
        assert keyed["root"].post("/v1/completions", json=body, headers=for_acme).is_success
        assert keyed["acme-app"].post("/v1/completions", json=body, headers=for_acme).is_success
        assert keyed["zeta-app"].post("/v1/completions", json=body).is_success
        tenants = [request.tenant for request in keyed.server.engine.submitted]
        assert tenants == ["acme", "acme", "zeta"]
        other = keyed["zeta-app"].post("/v1/completions", json=body, headers=for_acme)
        assert (other.status_code, other.json()["error"]["code"]) == (403, "tenant_forbidden")
        # It asks for the tenant, so it may what the tenant may, and no more.
        assert keyed["root"].get("/v1/keys", headers=for_acme).status_code == 403
        odd = keyed["root"].get("/v1/models", headers={"x-tenant": "a/b"})
        assert odd.json()["error"]["code"] == "invalid_tenant"


def test_the_real_clients_bring_their_keys(tmp_path, vocabulary):
    with keyed_server(tmp_path, vocabulary) as keyed:
        secret = keyed["acme-app"].headers["authorization"].removeprefix("Bearer ")
        with openai.OpenAI(base_url=f"{keyed.server.url}/v1", api_key=secret) as client:
            assert client.models.list().data[0].id == BASE
        with anthropic.Anthropic(base_url=keyed.server.url, api_key=secret) as client:
            assert client.models.list().data[0].id == BASE
        with (
            openai.OpenAI(
                base_url=f"{keyed.server.url}/v1", api_key="lp-x", max_retries=0
            ) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()
