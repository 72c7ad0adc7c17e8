from __future__ import annotations

import threading

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from loraplex_server.adapters.audit_log import Actor, read_audit
from loraplex_server.tenants.api_key import KeyWish, digest_of
from loraplex_server.tenants.errors import InvalidKeyWish, KeyNotFound
from loraplex_server.tenants.key_store import KeyStore
from loraplex_server.tenants.principal import Role

ADMIN = KeyWish("root", Role.ADMIN)
USER = KeyWish("app", Role.USER, "acme", expires_in_s=60)


def audit_of(engine) -> list[tuple]:
    with engine.connect() as connection:
        entries = read_audit(connection, limit=100)
    return [(e.action, e.subject, e.tenant, e.actor.key_id) for e in reversed(entries)]


def test_a_key_is_found_by_its_secret_and_the_secret_is_nowhere(open_one):
    engine = open_one()
    store = KeyStore(engine, clock=lambda: 1000.0)
    root, root_secret = store.create(ADMIN, Actor())
    app, secret = store.create(USER, Actor(root.key_id, "r1"))
    assert secret.startswith("lp-")
    assert len(secret) >= 32 + 3
    known = KeyStore(open_one()).read()
    assert known.by_digest[digest_of(secret)] == app
    assert (app.expires, app.has_expired(1059.9), app.has_expired(1060.0)) == (1060, False, True)
    assert known.tenants == {"acme"}
    with engine.connect() as connection:
        for table in ("api_keys", "audit"):
            rows = connection.execute(text(f"SELECT * FROM {table}")).all()
            assert secret not in repr(rows)
            assert root_secret not in repr(rows)
    assert audit_of(engine) == [
        ("key.create", root.key_id, "", "local"),
        ("key.create", app.key_id, "acme", root.key_id),
    ]


def test_a_revoked_key_is_gone_and_the_server_stays_closed(open_one):
    store = KeyStore(open_one())
    key, _ = store.create(ADMIN, Actor())
    before = store.num_changes()
    store.revoke(key.key_id, Actor())
    assert store.num_changes() == before + 1
    known = store.read()
    assert (known.by_digest, known.is_any) == ({}, True)
    assert store.list(limit=10) == []
    with pytest.raises(KeyNotFound):
        store.revoke(key.key_id, Actor())
    assert store.num_changes() == before + 1
    store.create(USER, Actor())
    assert store.forget_all(Actor()) == 1
    assert not store.read().is_any


def test_the_first_key_is_an_admins_or_everybody_would_be_locked_out(open_one):
    store = KeyStore(open_one())
    with pytest.raises(InvalidKeyWish, match="the role admin first"):
        store.create(USER, Actor())
    assert not store.read().is_any
    store.create(USER, Actor(), has_other_admin=True)


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        (KeyWish("", Role.ADMIN), "name"),
        (KeyWish("a\nb", Role.ADMIN), "name"),
        (KeyWish("a", Role.USER), "tenant"),
        (KeyWish("a", Role.USER, "a/b"), "tenant"),
        (KeyWish("a", Role.USER, ".a"), "tenant"),
        (KeyWish("a", Role.USER, "a..b"), "tenant"),
        (KeyWish("a", Role.USER, "x" * 65), "tenant"),
        (KeyWish("a", Role.USER, "a", 0), "expires_in_s"),
    ],
)
def test_keys_that_cannot_be_are_refused(wish, param):
    with pytest.raises(InvalidKeyWish) as caught:
        wish.check()
    assert caught.value.param == param


def test_keys_are_listed_page_by_page_in_the_order_of_their_making(open_one):
    now = [1000.0]
    store = KeyStore(open_one(), clock=lambda: now[0])
    made = []
    for _ in range(5):
        now[0] += 0.01
        made.append(store.create(ADMIN, Actor())[0].key_id)
    pages, after = [], None
    while page := store.list(limit=2, after=after):
        pages += [key.key_id for key in page]
        after = pages[-1]
    assert pages == made


def test_the_latest_use_is_kept(open_one):
    store = KeyStore(open_one())
    key, _ = store.create(ADMIN, Actor())
    for when in (50, 70, 60):
        store.touch({key.key_id: when, "key_of_nobody": 1})
    assert store.list(limit=1)[0].last_used == 70


def test_of_two_first_keys_made_at_once_one_is_an_admins(open_one):
    """Whoever changes keys waits for whoever does already, so the rule of the first one holds."""
    stores, outcomes = [KeyStore(open_one()) for _ in range(2)], []

    def create(store, wish):
        try:
            outcomes.append(store.create(wish, Actor())[0].role)
        except InvalidKeyWish:
            outcomes.append(None)

    pairs = zip(stores, (ADMIN, USER), strict=True)
    threads = [threading.Thread(target=create, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert Role.ADMIN in outcomes
    assert len(stores[0].list(limit=10)) == sum(outcome is not None for outcome in outcomes)
    assert stores[0].num_changes() == len(stores[0].list(limit=10))


@pytest.mark.parametrize("change", ["UPDATE audit SET actor = 'x'", "DELETE FROM audit"])
def test_the_database_itself_refuses_to_change_the_audit(open_one, change):
    engine = open_one()
    KeyStore(engine).create(ADMIN, Actor())
    with pytest.raises(DBAPIError, match="append-only"), engine.begin() as connection:
        connection.execute(text(change))
    assert len(audit_of(engine)) == 1
