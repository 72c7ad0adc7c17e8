"""The statements on names and versions of one scope, each in the caller's transaction."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache, partial
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Connection,
    Row,
    Select,
    and_,
    bindparam,
    case,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from loraplex_memory.layout import ModelGeometry
from loraplex_server.adapters.defaults import AdapterDefaults
from loraplex_server.adapters.name_changes import lock_for_transaction
from loraplex_server.adapters.record import EVERYBODY
from loraplex_server.adapters.registration import NameSettings
from loraplex_server.adapters.registry_tables import adapters, names, versions
from loraplex_server.adapters.spec_json import decode_spec, encode_spec
from loraplex_server.adapters.version_row import NewVersion, StoredAdapter, VersionRow

_SPEC_CACHE: Final = 1024


class Registry:
    """Stateless; names and versions belong to `scope`, adapters to all scopes together."""

    def __init__(self, scope: str, num_layers: int) -> None:
        self.scope = scope
        # Thousands of adapters of one shape have one spec, which is costly to decode.
        self._decode_spec = lru_cache(_SPEC_CACHE)(partial(decode_spec, num_layers=num_layers))

    # ---- looking up ------------------------------------------------------------------------

    def find(self, connection: Connection, name: str) -> VersionRow | None:
        """Return the current version."""
        query = self._rows().where(names.c.name == name, versions.c.version == names.c.current)
        row = connection.execute(query).first()
        return self._decode(row) if row else None

    def lock(self, connection: Connection, name: str) -> None:
        """Let nobody else add or change the name in this transaction; it may have no row yet."""
        lock_for_transaction(connection, f"{self.scope}\n{name}")

    def lock_contents(self, connection: Connection, name: str, *others: str) -> None:
        """Let nobody else name or drop what the name stands for, nor the others; after `lock`.

        Rows are locked in one order everywhere, or two servers could wait for each other's. What is
        named at this moment is seen by whoever looks afterwards.
        """
        of_name = select(versions.c.adapter_id).where(self._is_version(name))
        is_one = or_(adapters.c.id.in_(of_name), adapters.c.id.in_(others))
        query = select(adapters.c.id).where(is_one).order_by(adapters.c.id)
        connection.execute(query.with_for_update()).all()

    def lock_owner(self, connection: Connection, owner: str) -> None:
        """Let nobody else add to what the owner has in this transaction; before `lock`."""
        lock_for_transaction(connection, f"owner\n{self.scope}\n{owner}")

    def lock_pins(self, connection: Connection) -> None:
        """Let nobody else pin anything in this transaction; before `lock`."""
        lock_for_transaction(connection, f"pins\n{self.scope}")

    def find_by_id(
        self, connection: Connection, name: str, id_prefix: str, limit: int = 2
    ) -> list[VersionRow]:
        """Return the versions whose id begins so."""
        query = self._rows().where(
            names.c.name == name, versions.c.adapter_id.startswith(id_prefix, autoescape=True)
        )
        return [self._decode(row) for row in connection.execute(query.limit(limit))]

    def find_version(self, connection: Connection, name: str, version: int) -> VersionRow | None:
        query = self._rows().where(names.c.name == name, versions.c.version == version)
        row = connection.execute(query).first()
        return self._decode(row) if row else None

    def find_like(self, connection: Connection, name: str) -> str | None:
        """Return a name that differs from `name` in case at most; stored names are ASCII."""
        query = select(names.c.name).where(
            names.c.scope == self.scope, func.lower(names.c.name) == name.casefold()
        )
        return connection.execute(query).scalar()

    def page(
        self, connection: Connection, limit: int, after: str | None, reader: str | None = None
    ) -> list[VersionRow]:
        """Return up to `limit` current versions behind `after`, ordered by name (code points).

        Args:
            reader: only what this tenant may read.
        """
        query = self._rows().where(versions.c.version == names.c.current)
        if reader is not None:
            query = query.where(_is_readable(connection, reader))
        if after is not None:
            query = query.where(names.c.name > after)
        rows = connection.execute(query.order_by(names.c.name).limit(limit))
        return [self._decode(row) for row in rows]

    def versions(
        self, connection: Connection, name: str, limit: int | None, before: int | None = None
    ) -> list[VersionRow]:
        """Return up to `limit` versions older than `before`, newest first."""
        query = self._rows().where(names.c.name == name)
        if before is not None:
            query = query.where(versions.c.version < before)
        rows = connection.execute(query.order_by(versions.c.version.desc()).limit(limit))
        return [self._decode(row) for row in rows]

    def pinned(self, connection: Connection) -> list[VersionRow]:
        """Return the current versions of all pinned names."""
        query = self._rows().where(names.c.pinned, versions.c.version == names.c.current)
        return [self._decode(row) for row in connection.execute(query.order_by(names.c.name))]

    def expired(self, connection: Connection, now: int, limit: int) -> list[str]:
        """Return names whose time is up."""
        query = select(names.c.name).where(self._is_expired(now)).order_by(names.c.name)
        return list(connection.execute(query.limit(limit)).scalars())

    def is_expired(self, connection: Connection, name: str, now: int) -> bool:
        """Whether its time is up, whatever uses others are writing down at this moment."""
        query = select(names.c.name).where(self._is(name), self._is_expired(now)).with_for_update()
        return connection.execute(query).first() is not None

    def owned(self, connection: Connection, owner: str) -> tuple[int, int]:
        """Return how many names an owner has, and the bytes of all their versions."""
        is_owned = and_(names.c.scope == self.scope, names.c.owner == owner)
        num_names = connection.execute(select(func.count()).where(is_owned)).scalar_one()
        size = func.coalesce(func.sum(adapters.c.size_bytes + adapters.c.native_bytes), 0)
        query = (
            select(size)
            .select_from(versions)
            .join(names, and_(names.c.scope == versions.c.scope, names.c.name == versions.c.name))
            .join(adapters)
            .where(is_owned)
        )
        return int(num_names), int(connection.execute(query).scalar_one())

    def report(self, connection: Connection, name: str, version: int) -> Any:
        """Return what the reader said of a version, as JSON values; None if it is gone."""
        query = select(versions.c.report).where(
            self._is_version(name), versions.c.version == version
        )
        text = connection.execute(query).scalar()
        return None if text is None else json.loads(text)

    # ---- changing --------------------------------------------------------------------------

    def add_version(self, connection: Connection, new: NewVersion) -> None:
        """Make it the name's current version, the name's first one if need be."""
        self._add_adapter(connection, new.adapter)
        version = self._next_version(connection, new)
        connection.execute(
            insert(versions).values(
                scope=self.scope,
                name=new.name,
                version=version,
                adapter_id=new.adapter.adapter_id,
                base_model=new.base_model,
                created=new.created,
                source=new.source,
                report=new.report,
            )
        )

    def set_current(self, connection: Connection, name: str, version: int, now: int) -> None:
        values = {"current": version, "active": now}
        connection.execute(update(names).where(self._is(name)).values(**values))

    def set_settings(self, connection: Connection, name: str, settings: Mapping[str, Any]) -> None:
        """Change the given fields of `NameSettings`."""
        values = dict(settings)
        if "defaults" in values:
            values["defaults"] = json.dumps(values["defaults"].to_json())
        if values.get("readers") is not None:
            values["readers"] = json.dumps(values["readers"])
        if values:
            connection.execute(update(names).where(self._is(name)).values(**values))

    def touch(self, connection: Connection, uses: Mapping[str, int]) -> None:
        """Note when names were used last, in Unix seconds; later times that are known stay."""
        used_at = bindparam("used_at", type_=BigInteger)
        last_used = func.coalesce(names.c.last_used, 0)
        statement = (
            update(names)
            .where(names.c.scope == self.scope, names.c.name == bindparam("used_name"))
            .values(
                last_used=case((last_used > used_at, last_used), else_=used_at),
                active=case((names.c.active > used_at, names.c.active), else_=used_at),
            )
        )
        # In one order everywhere, or two servers could wait for each other's rows.
        rows = [{"used_name": name, "used_at": when} for name, when in sorted(uses.items())]
        if rows:
            connection.execute(statement, rows)

    def remove_versions(
        self, connection: Connection, name: str, old: Iterable[VersionRow]
    ) -> set[str]:
        """Remove versions that are not current; returns the adapters that went with them."""
        rows = list(old)
        numbers = [row.version for row in rows]
        connection.execute(
            delete(versions).where(self._is_version(name), versions.c.version.in_(numbers))
        )
        return _drop_unnamed(connection, {row.adapter_id for row in rows})

    def remove_name(self, connection: Connection, name: str) -> set[str]:
        """Remove a name with all its versions; returns the adapters that went with it."""
        ids = select(versions.c.adapter_id).where(self._is_version(name))
        going = set(connection.execute(ids).scalars())
        connection.execute(delete(versions).where(self._is_version(name)))
        connection.execute(delete(names).where(self._is(name)))
        return _drop_unnamed(connection, going)

    # ---- pieces ----------------------------------------------------------------------------

    def _is(self, name: str) -> Any:
        return and_(names.c.scope == self.scope, names.c.name == name)

    def _is_version(self, name: str) -> Any:
        return and_(versions.c.scope == self.scope, versions.c.name == name)

    def _is_expired(self, now: int) -> Any:
        return and_(
            names.c.scope == self.scope,
            names.c.ttl_s.is_not(None),
            names.c.pinned.is_(False),
            names.c.active + names.c.ttl_s <= now,
        )

    def _add_adapter(self, connection: Connection, adapter: StoredAdapter) -> None:
        dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
        values = {
            "spec": encode_spec(adapter.spec),
            "size_bytes": adapter.size_bytes,
            "native_bytes": adapter.native_bytes,
            "self_test_error": adapter.self_test_error,
        }
        connection.execute(
            dialect.insert(adapters)
            .values(id=adapter.adapter_id, **values)
            .on_conflict_do_update(index_elements=["id"], set_=values)
        )

    def _next_version(self, connection: Connection, new: NewVersion) -> int:
        last = connection.execute(select(names.c.last_version).where(self._is(new.name))).scalar()
        version = 1 if last is None else int(last) + 1
        values = {"current": version, "last_version": version, "active": new.created}
        if last is None:
            fresh = {"pinned": False, "defaults": "{}", "owner": new.owner, **values}
            connection.execute(insert(names).values(scope=self.scope, name=new.name, **fresh))
        else:
            connection.execute(update(names).where(self._is(new.name)).values(**values))
        return version

    def _rows(self) -> Select[Any]:
        return (
            select(
                versions.c.name,
                versions.c.version,
                (versions.c.version == names.c.current).label("is_current"),
                versions.c.adapter_id,
                versions.c.base_model,
                versions.c.created,
                versions.c.source,
                names.c.last_used,
                names.c.pinned,
                names.c.ttl_s,
                names.c.defaults,
                names.c.owner,
                names.c.readers,
                adapters.c.spec,
                adapters.c.size_bytes,
                adapters.c.native_bytes,
                adapters.c.self_test_error,
            )
            .select_from(versions)
            .join(names, and_(names.c.scope == versions.c.scope, names.c.name == versions.c.name))
            .join(adapters)
            .where(versions.c.scope == self.scope)
        )

    def _decode(self, row: Row[Any]) -> VersionRow:
        return VersionRow(
            name=row.name,
            version=row.version,
            is_current=bool(row.is_current),
            adapter=StoredAdapter(
                adapter_id=row.adapter_id,
                spec=self._decode_spec(row.spec),
                size_bytes=row.size_bytes,
                native_bytes=row.native_bytes,
                self_test_error=row.self_test_error,
            ),
            base_model=row.base_model,
            created=row.created,
            source=row.source,
            last_used=row.last_used,
            settings=NameSettings(
                pinned=row.pinned,
                ttl_s=row.ttl_s,
                defaults=AdapterDefaults.model_validate_json(row.defaults),
                readers=None if row.readers is None else tuple(json.loads(row.readers)),
            ),
            owner=row.owner,
        )


def _is_readable(connection: Connection, reader: str) -> Any:
    """Return the condition that `AdapterRecord.readers` and its owner make of a row."""
    # Not LIKE, for which SQLite knows no case. No tenant's name has a quote.
    find = func.strpos if connection.dialect.name == "postgresql" else func.instr
    by_rule = and_(names.c.readers.is_(None), names.c.owner == "")
    named = [find(names.c.readers, json.dumps(who)) > 0 for who in (reader, EVERYBODY)]
    own = and_(names.c.owner == reader, names.c.owner != "")
    return or_(own, by_rule, *named)


def _drop_unnamed(connection: Connection, ids: set[str]) -> set[str]:
    """Remove those adapters that no version of any scope stands for; they are locked."""
    query = select(versions.c.adapter_id).where(versions.c.adapter_id.in_(ids))
    unnamed = ids - set(connection.execute(query).scalars())
    connection.execute(delete(adapters).where(adapters.c.id.in_(unnamed)))
    return unnamed


def stored_ids(connection: Connection, among: Collection[str] | None = None) -> set[str]:
    """Ids of every adapter of every scope, or those among the given ones."""
    query = select(adapters.c.id)
    if among is not None:
        query = query.where(adapters.c.id.in_(among))
    return set(connection.execute(query).scalars())


def stored_sizes(connection: Connection) -> dict[str, int]:
    """Return the bytes of every adapter's canonical file, of every scope, by the adapter's id."""
    rows = connection.execute(select(adapters.c.id, adapters.c.size_bytes))
    return {row.id: row.size_bytes for row in rows}


def is_stored(connection: Connection, adapter_id: str) -> bool:
    """Whether any name of any scope stands for the adapter."""
    return bool(stored_ids(connection, {adapter_id}))


def scope_of(base_id: str, geometry: ModelGeometry) -> str:
    """Return the stored form of one base; it must stay the same across releases."""
    sizes = (
        geometry.num_layers,
        geometry.hidden_size,
        geometry.num_heads,
        geometry.num_kv_heads,
        geometry.head_dim,
        geometry.intermediate_size,
    )
    return f"{base_id} {'-'.join(map(str, sizes))}"
