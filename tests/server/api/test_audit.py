from __future__ import annotations

import pytest

from tests.server.api.conftest import make_adapter
from tests.support.keyed_server import PEOPLE, keyed_server


@pytest.fixture(scope="module")
def keyed(tmp_path_factory, vocabulary):
    with keyed_server(tmp_path_factory.mktemp("audit"), vocabulary) as running:
        yield running


def test_every_change_has_its_entry_and_nothing_else_has_one(keyed, tmp_path):
    one, two = (make_adapter(tmp_path / f"a{seed}", seed=seed) for seed in range(2))
    acme, root = keyed["acme-up"], keyed["root"]
    keyed.upload("acme-up", "pirate", one)
    keyed.upload("acme-up", "pirate", one)  # the same again changes nothing
    keyed.upload("acme-up", "pirate", two, replace="true")
    acme.post("/v1/adapters/pirate/rollback", json={"version": 1})
    acme.patch("/v1/adapters/pirate", json={"ttl_s": 60, "defaults": {"system_prompt": "Arr."}})
    root.delete("/v1/adapters/acme/pirate", headers={"x-request-id": "r-7"})
    acme.delete("/v1/adapters/nobody")
    keyed.upload("zeta-up", "acme/pirate", one, replace="maybe")
    made = root.post("/v1/keys", json={"name": "x", "role": "user", "tenant": "acme"}).json()
    root.delete(f"/v1/keys/{made['id']}")
    entries = root.get("/v1/audit").json()["data"]
    shown = [(e["action"], e["subject"], e["actor"], e["tenant"]) for e in reversed(entries)]
    up, admin = keyed.key_ids["acme-up"], keyed.key_ids["root"]
    first = [("key.create", keyed.key_ids[name], "local", tenant) for name, _, tenant in PEOPLE]
    actions = ("create", "replace", "rollback", "change")
    assert shown == [
        *first,
        *((f"adapter.{action}", "acme/pirate", up, "acme") for action in actions),
        ("adapter.delete", "acme/pirate", admin, "acme"),
        ("key.create", made["id"], admin, "acme"),
        ("key.revoke", made["id"], admin, "acme"),
    ]
    deleted, changed = entries[2], entries[3]
    assert deleted["request_id"] == "r-7"
    assert deleted["adapter_id"].startswith("sha256:")
    assert len(deleted["details"]["ids"]) == 2
    assert changed["details"] == {"ttl_s": 60, "defaults": "set"}
    assert made["secret"] not in str(entries)


def test_the_audit_is_read_page_by_page_and_by_subject(keyed):
    root, entries, after = keyed["root"], [], None
    while True:
        page = root.get(
            "/v1/audit", params={"limit": 2, **({"after": after} if after else {})}
        ).json()
        entries += [entry["id"] for entry in page["data"]]
        after = page["last"]
        if not page["has_more"]:
            break
    assert entries == sorted(entries, key=int, reverse=True)
    assert len(entries) == len(root.get("/v1/audit", params={"limit": 1000}).json()["data"])
    key_id = keyed.key_ids["zeta-app"]
    (entry,) = root.get("/v1/audit", params={"subject": key_id}).json()["data"]
    assert (entry["object"], entry["action"], entry["tenant"]) == (
        "audit.entry",
        "key.create",
        "zeta",
    )
    assert {
        e["tenant"] for e in root.get("/v1/audit", params={"tenant": "zeta"}).json()["data"]
    } == {"zeta"}
    assert root.get("/v1/audit", params={"after": "x"}).json()["error"]["code"] == "invalid_cursor"
