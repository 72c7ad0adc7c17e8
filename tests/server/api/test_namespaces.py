"""What one tenant can see, use and change of another's adapters: nothing, unless it is let."""

from __future__ import annotations

import contextlib

import httpx
import pytest

from tests.server.api.conftest import BASE, make_adapter
from tests.support.keyed_server import keyed_server


@pytest.fixture(scope="module")
def shared_keyed(tmp_path_factory, vocabulary):
    with keyed_server(tmp_path_factory.mktemp("namespaces"), vocabulary) as running:
        yield running


@pytest.fixture
def keyed(shared_keyed, tmp_path):
    """Adapters `acme/secret`, `zeta/own` and the shared `pirate`, all different."""
    for seed, (person, name) in enumerate(
        [("acme-up", "secret"), ("zeta-up", "own"), ("root", "pirate")]
    ):
        folder = make_adapter(tmp_path / name, seed=seed)
        assert shared_keyed.upload(person, name, folder).status_code == 201
    yield shared_keyed
    shared_keyed.server.engine.reset()
    for adapter in shared_keyed["root"].get("/v1/adapters").json()["data"]:
        shared_keyed["root"].delete(f"/v1/adapters/{adapter['name']}")


def names(keyed, person: str) -> list[str]:
    return [adapter["name"] for adapter in keyed[person].get("/v1/adapters").json()["data"]]


def models(keyed, person: str) -> list[str]:
    return [model["id"] for model in keyed[person].get("/v1/models").json()["data"]]


def test_lists_show_what_is_ones_own_or_shared(keyed):
    assert names(keyed, "root") == ["acme/secret", "pirate", "zeta/own"]
    assert names(keyed, "acme-app") == ["acme/secret", "pirate"]
    assert names(keyed, "zeta-up") == ["pirate", "zeta/own"]
    assert models(keyed, "acme-app") == [BASE, "acme/secret", "pirate"]
    page = keyed["zeta-app"].get("/v1/adapters", params={"limit": 1}).json()
    assert (page["has_more"], page["last"]) == (True, "pirate")
    owners = {a["name"]: a["owner"] for a in keyed["root"].get("/v1/adapters").json()["data"]}
    assert owners == {"acme/secret": "acme", "pirate": "", "zeta/own": "zeta"}


def test_a_tenant_cannot_put_itself_before_the_others(keyed):
    answer = keyed.generate("acme-app", BASE, priority=-1)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "tenant_forbidden")
    assert keyed.generate("acme-app", BASE, priority=1).status_code == 200
    assert keyed.generate("root", BASE, priority=-1).status_code == 200


@pytest.fixture(scope="module")
def isolated(tmp_path_factory, vocabulary):
    data_dir = tmp_path_factory.mktemp("isolated")
    with keyed_server(data_dir, vocabulary, isolate_prefixes=True) as running:
        yield running


def salts(keyed, *asked: tuple[str, str | None]) -> list[str]:
    """Return the salts of requests of these people with these `cache_salt`s."""
    for person, cache_salt in asked:
        assert keyed.generate(person, BASE, cache_salt=cache_salt).status_code == 200
    return [request.prefix_salt for request in keyed.server.engine.submitted[-len(asked) :]]


def test_isolated_tenants_share_no_prefixes(isolated):
    acme, colleague, zeta, root = salts(
        isolated, ("acme-up", None), ("acme-app", None), ("zeta-app", None), ("root", None)
    )
    assert acme == colleague
    assert len({acme, zeta, root}) == 3
    asked = [(person, salt) for person in ("acme-app", "zeta-app") for salt in (None, "a", "zeta")]
    assert len(set(salts(isolated, *asked))) == 6
    assert len(set(salts(isolated, ("acme-up", "a"), ("acme-app", "a")))) == 1


def test_tenants_that_are_not_isolated_share_what_has_one_salt(keyed):
    plain, other, salted, same = salts(
        keyed, ("acme-app", None), ("zeta-app", None), ("acme-app", "a"), ("zeta-app", "a")
    )
    assert plain == other != salted == same


def test_a_tenant_says_its_adapters_names_with_its_own_or_without(keyed):
    record = keyed["acme-app"].get("/v1/adapters/secret").json()
    assert (record["name"], record["readers"]) == ("acme/secret", [])
    for name in ("secret", "acme/secret", f"secret@{record['id'][:20]}", f"{BASE}:secret"):
        answer = keyed.generate("acme-app", name)
        assert (answer.status_code, answer.json()["model"]) == (200, name)
        assert keyed.server.engine.submitted[-1].adapter.adapter_id == record["id"]
    assert keyed.generate("zeta-app", "pirate").status_code == 200


def ways_to(record: dict) -> list[tuple[str, str, dict | None]]:
    """Return all requests that name another's adapter."""
    name, prompt = record["name"], {"prompt": "a"}
    chat = [{"role": "user", "content": "a"}]
    version = f"{name}@{record['id']}"
    found: list[tuple[str, str, dict | None]] = [
        ("POST", "/v1/completions", {"model": wish, **prompt})
        for wish in (name, version, f"{BASE}:{name}")
    ]
    found += [
        ("POST", "/v1/completions", {"model": BASE, "adapter_id": name, **prompt}),
        ("POST", "/v1/completions", {"model": BASE, "lora_path": version, **prompt}),
        ("POST", "/v1/completions", {"adapters": [{"name": "own"}, {"name": name}], **prompt}),
        ("POST", "/v1/chat/completions", {"model": name, "messages": chat}),
        ("POST", "/v1/completions", {"models": ["own", name], **prompt}),
        ("POST", "/v1/embeddings", {"model": name, "input": "a"}),
        ("POST", "/v1/responses", {"model": name, "input": "a"}),
        ("POST", "/v1/messages", {"model": name, "messages": chat, "max_tokens": 1}),
        ("POST", "/v1/messages/count_tokens", {"model": name, "messages": chat}),
        ("POST", "/tokenize", {"model": name, **prompt}),
        ("POST", "/detokenize", {"model": name, "tokens": [5]}),
        ("POST", "/generate", {"inputs": "a", "parameters": {"adapter_id": name}}),
        ("POST", "/generate_stream", {"inputs": "a", "parameters": {"adapter_id": name}}),
    ]
    for path in ("/v1/models/", "/v1/adapters/"):
        for what in (name, version):
            found += [(verb, path + what, None) for verb in ("GET", "DELETE")]
    found += [
        ("GET", f"/v1/adapters/{name}/versions", None),
        ("POST", f"/v1/adapters/{name}/prefetch", None),
        ("POST", f"/v1/adapters/{name}/rollback", {"version": 1}),
        ("PATCH", f"/v1/adapters/{name}", {"ttl_s": 60}),
    ]
    return found


def test_what_may_not_be_seen_is_not_there_wherever_it_is_named(keyed):
    record = keyed["root"].get("/v1/adapters/acme/secret").json()
    missing = {**record, "name": "acme/absent"}
    for real, absent in zip(ways_to(record), ways_to(missing), strict=True):
        answers = [keyed["zeta-up"].request(m, path, json=body) for m, path, body in (real, absent)]
        assert [answer.status_code for answer in answers] == [404, 404], (real, answers[0].text)
        told = [answer.text.replace("absent", "secret") for answer in answers]
        assert told[0] == told[1], real
    assert keyed.server.engine.submitted == []
    assert names(keyed, "root") == ["acme/secret", "pirate", "zeta/own"]


def test_readers_may_use_it_and_not_change_it(keyed):
    change = keyed["acme-up"].patch("/v1/adapters/secret", json={"readers": ["zeta"]})
    assert change.json()["readers"] == ["zeta"]
    assert keyed.generate("zeta-app", "acme/secret").status_code == 200
    assert names(keyed, "zeta-app") == ["acme/secret", "pirate", "zeta/own"]
    for method, path, body in (
        ("DELETE", "/v1/adapters/acme/secret", None),
        ("DELETE", "/v1/models/acme/secret", None),
        ("PATCH", "/v1/adapters/acme/secret", {"readers": ["*"]}),
        ("POST", "/v1/adapters/acme/secret/rollback", {"version": 1}),
        ("PATCH", "/v1/adapters/pirate", {"ttl_s": 60}),
    ):
        refused = keyed["zeta-up"].request(method, path, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "adapter_not_owned")
    keyed["acme-up"].patch("/v1/adapters/secret", json={"readers": []})
    assert keyed.generate("zeta-app", "acme/secret").status_code == 404


def test_admins_narrow_what_is_shared(keyed):
    keyed["root"].patch("/v1/adapters/pirate", json={"readers": ["zeta"]})
    assert "pirate" not in names(keyed, "acme-app")
    assert keyed.generate("acme-app", "pirate").status_code == 404
    assert keyed.generate("zeta-app", "pirate").status_code == 200
    keyed["root"].patch("/v1/adapters/pirate", json={"readers": None})
    assert keyed.generate("acme-app", "pirate").status_code == 200


def test_tenants_are_told_apart_by_case_and_by_whole_names(keyed):
    keyed["acme-up"].patch("/v1/adapters/secret", json={"readers": ["Zeta", "zet", "zetaa"]})
    assert "acme/secret" not in names(keyed, "zeta-app")
    assert keyed.generate("zeta-app", "acme/secret").status_code == 404
    refused = keyed["acme-up"].patch("/v1/adapters/secret", json={"readers": ['a"b']})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "readers")


def test_two_tenants_may_use_one_name_and_ones_own_comes_first(keyed, tmp_path):
    folder = make_adapter(tmp_path / "mine", seed=7)
    made = keyed.upload("acme-up", "pirate", folder).json()
    assert made["name"] == "acme/pirate"
    assert keyed["acme-app"].get("/v1/adapters/pirate").json()["id"] == made["id"]
    assert keyed["zeta-app"].get("/v1/adapters/pirate").json()["id"] != made["id"]


def test_nobody_writes_into_anothers_namespace(keyed, tmp_path):
    folder = make_adapter(tmp_path / "other", seed=8)
    made = keyed.upload("zeta-up", "acme/secret", folder, replace="true").json()
    assert (made["name"], made["owner"]) == ("zeta/acme/secret", "zeta")
    given = keyed.upload("root", "acme/gift", folder).json()
    assert (given["name"], given["owner"]) == ("acme/gift", "acme")
    assert keyed["acme-up"].delete("/v1/adapters/gift").status_code == 200


def test_a_shared_name_that_looks_like_a_tenants_is_not_the_tenants(keyed, tmp_path):
    """Such as one of before there were keys."""
    with contextlib.closing(keyed.server.catalog.database.raw_connection()) as connection:
        connection.execute("UPDATE names SET owner = '' WHERE name = 'acme/secret'")
        connection.commit()
    assert keyed.generate("zeta-app", "acme/secret").status_code == 200
    folder = make_adapter(tmp_path / "other", seed=9)
    refused = keyed.upload("acme-up", "secret", folder, replace="true")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "adapter_not_owned")
    assert keyed["acme-up"].delete("/v1/adapters/secret").status_code == 403


def test_tenants_pin_nothing_and_fetch_with_no_rights_of_the_servers(keyed):
    pinned = keyed["acme-up"].patch("/v1/adapters/secret", json={"pinned": True})
    assert (pinned.status_code, pinned.json()["error"]["code"]) == (403, "tenant_forbidden")
    for source in ("file:///srv/a", "s3://bucket/a", "hf://o/a", "http://here/a", "FILE:///x"):
        answer = keyed["acme-up"].post("/v1/adapters", json={"name": "a", "source": source})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "source_forbidden")


def test_without_keys_nothing_changes(server, adapter):
    record = httpx.get(f"{server.url}/v1/adapters/{adapter}").json()
    assert (record["name"], record["owner"], record["readers"]) == ("team/pirate", "", ["*"])
