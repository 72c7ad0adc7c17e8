from __future__ import annotations

import httpx
import pytest

from loraplex_server.api.access import OPEN_PATHS, ROLES, operations
from loraplex_server.tenants.principal import Role
from tests.support.keyed_server import keyed_server

PERSONS = {"root": Role.ADMIN, "acme-up": Role.UPLOADER, "acme-app": Role.USER}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory, vocabulary):
    settings = {"metrics_open": False}
    with keyed_server(tmp_path_factory.mktemp("access"), vocabulary, **settings) as running:
        yield running


def in_path(operation: str) -> tuple[str, str]:
    method, path = operation.split()
    return method, path.replace("{name:path}", "nobody").replace("{key_id}", "key_0")


def test_every_endpoint_has_a_role_or_is_open(keyed):
    found = operations(keyed.server.app.routes)
    assert len(found) > 20
    documentation = {"GET /docs", "GET /openapi.json", "GET /redoc", "GET /docs/oauth2-redirect"}
    open_ones = {f"GET {path}" for path in OPEN_PATHS}
    assert [o for o in found if o not in ROLES and o not in open_ones | documentation] == []


def test_each_role_gets_as_far_as_the_table_says(keyed):
    """Refused is 403 and names the role; whoever is let through gets any other answer."""
    for operation in operations(keyed.server.app.routes):
        needed = ROLES.get(operation)
        if needed is None:
            continue
        method, path = in_path(operation)
        for person, role in PERSONS.items():
            answer = keyed[person].request(method, path)
            is_refused = "role_required" in answer.text or "this needs a key" in answer.text
            assert is_refused != role.includes(needed), (operation, person, answer.text)
        stranger = httpx.request(method, f"{keyed.server.url}{path}", timeout=20)
        assert stranger.status_code == 401, operation


def test_what_the_table_does_not_know_is_an_admins(keyed, monkeypatch):
    monkeypatch.delitem(ROLES, "GET /version")
    assert keyed["acme-up"].get("/version").status_code == 403
    assert keyed["root"].get("/version").status_code == 200


def test_a_refusal_says_what_would_do(keyed):
    answer = keyed["acme-app"].get("/v1/pool")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "role_required")
    assert "loraplex keys create --role admin" in answer.json()["error"]["message"]


def test_probes_need_no_key(keyed):
    assert httpx.get(f"{keyed.server.url}/health").status_code == 200
