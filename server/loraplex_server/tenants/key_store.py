"""Keys in the database. Every change is one transaction with its audit entry."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    Connection,
    Engine,
    Row,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from loraplex_server.adapters.audit_log import Actor, AuditEntry, write_audit
from loraplex_server.adapters.data_dir import storage_errors
from loraplex_server.adapters.tenant_tables import api_keys, key_changes
from loraplex_server.tenants.api_key import ApiKey, KeyWish, digest_of, new_key_id, new_secret
from loraplex_server.tenants.errors import InvalidKeyWish, KeyNotFound
from loraplex_server.tenants.principal import Role


@dataclass(frozen=True)
class KnownKeys:
    """All keys at one moment.

    Attributes:
        num_changes: of keys, up to then or shortly before.
        by_digest: live ones, expired ones included, by the digest of their secrets.
        is_any: whether a key was ever made: revoking the last one locks a server, never opens it.
        tenants: of all keys that ever were.
    """

    num_changes: int
    by_digest: Mapping[str, ApiKey]
    is_any: bool
    tenants: frozenset[str]


class KeyStore:
    """Stateless; every method blocks and may be called from any thread. Raises StorageFailed."""

    def __init__(self, database: Engine, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    # ---- looking up ------------------------------------------------------------------------

    def num_changes(self) -> int:
        """Return how often keys were changed: cheap, and tells whether to `read` again."""
        with storage_errors("look keys up"), self._database.connect() as connection:
            return _num_changes(connection)

    def read(self) -> KnownKeys:
        """Return all keys."""
        with storage_errors("read keys"), self._database.connect() as connection:
            # First: what changes between the two is then read once too often, and never missed.
            num_changes = _num_changes(connection)
            rows = connection.execute(select(api_keys)).all()
        return KnownKeys(
            num_changes=num_changes,
            by_digest={row.secret_sha256: _key(row) for row in rows if row.revoked is None},
            is_any=bool(rows),
            tenants=frozenset(row.tenant for row in rows) - {""},
        )

    def list(self, *, limit: int, after: str | None = None) -> list[ApiKey]:
        """Return up to `limit` live keys in the order of their making, those behind the id."""
        query = select(api_keys).where(api_keys.c.revoked.is_(None))
        if after is not None:
            query = query.where(api_keys.c.id > after)
        with storage_errors("list keys"), self._database.connect() as connection:
            return [
                _key(row) for row in connection.execute(query.order_by(api_keys.c.id).limit(limit))
            ]

    # ---- changing --------------------------------------------------------------------------

    def create(
        self, wish: KeyWish, actor: Actor, *, has_other_admin: bool = False
    ) -> tuple[ApiKey, str]:
        """Make a key and return it with its secret, which is kept nowhere.

        Args:
            has_other_admin: an admin's key is there beside those of the database.

        Raises:
            InvalidKeyWish: also of a first key that is no admin's, which would lock everybody out.
        """
        wish.check()
        secret, now = new_secret(), self._clock()
        expires = None if wish.expires_in_s is None else int(now) + wish.expires_in_s
        key = ApiKey(new_key_id(now), wish.name, wish.role, wish.tenant, int(now), expires)
        with storage_errors("make a key"), self._database.begin() as connection:
            _count_change(connection)  # first: from here on, whoever changes keys waits
            is_first = connection.execute(select(api_keys.c.id).limit(1)).first() is None
            if is_first and key.role is not Role.ADMIN and not has_other_admin:
                raise InvalidKeyWish(
                    "the first key closes the server to all without one, so it must be an admin's: "
                    "make a key of the role admin first",
                    param="role",
                )
            connection.execute(
                insert(api_keys).values(
                    id=key.key_id,
                    name=key.name,
                    role=key.role.value,
                    tenant=key.tenant,
                    secret_sha256=digest_of(secret),
                    created=key.created,
                    expires=key.expires,
                )
            )
            _note(connection, "create", key, actor, int(now))
        return key, secret

    def revoke(self, key_id: str, actor: Actor) -> ApiKey:
        """End a key for good; raises KeyNotFound."""
        now = int(self._clock())
        is_it = (api_keys.c.id == key_id) & api_keys.c.revoked.is_(None)
        with storage_errors("revoke a key"), self._database.begin() as connection:
            _count_change(connection)
            row = connection.execute(select(api_keys).where(is_it)).first()
            if row is None:
                raise KeyNotFound(key_id)
            connection.execute(update(api_keys).where(is_it).values(revoked=now))
            _note(connection, "revoke", _key(row), actor, now)
        return _key(row)

    def forget_all(self, actor: Actor) -> int:
        """End all keys and forget that there were any, which opens the server; returns how many."""
        now = int(self._clock())
        with storage_errors("revoke keys"), self._database.begin() as connection:
            _count_change(connection)
            keys = [_key(row) for row in connection.execute(select(api_keys)) if not row.revoked]
            for key in keys:
                _note(connection, "revoke", key, actor, now, opens_server=True)
            connection.execute(delete(api_keys))
        return len(keys)

    def touch(self, uses: Mapping[str, int]) -> None:
        """Note when keys were used last, by id, in Unix seconds; known later times stay."""
        used_at = bindparam("used_at", type_=BigInteger)
        statement = (
            update(api_keys)
            .where(
                api_keys.c.id == bindparam("used_id"),
                func.coalesce(api_keys.c.last_used, 0) < used_at,
            )
            .values(last_used=used_at)
        )
        # In one order everywhere, or two servers could wait for each other's rows.
        rows = [{"used_id": key_id, "used_at": when} for key_id, when in sorted(uses.items())]
        if rows:
            with storage_errors("note uses of keys"), self._database.begin() as connection:
                connection.execute(statement, rows)


def _num_changes(connection: Connection) -> int:
    return int(connection.execute(select(key_changes.c.count)).scalar() or 0)


def _count_change(connection: Connection) -> None:
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    connection.execute(
        dialect.insert(key_changes)
        .values(id=1, count=1)
        .on_conflict_do_update(index_elements=["id"], set_={"count": key_changes.c.count + 1})
    )


def _key(row: Row[Any]) -> ApiKey:
    return ApiKey(
        key_id=row.id,
        name=row.name,
        role=Role(row.role),
        tenant=row.tenant,
        created=row.created,
        expires=row.expires,
        last_used=row.last_used,
    )


def _note(
    connection: Connection, verb: str, key: ApiKey, actor: Actor, now: int, **details: Any
) -> None:
    shown = {"name": key.name, "role": key.role.value, **details}
    entry = AuditEntry(f"key.{verb}", key.key_id, key.tenant, details=shown, actor=actor)
    write_audit(connection, entry, now)
