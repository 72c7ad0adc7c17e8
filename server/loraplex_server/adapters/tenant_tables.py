"""The tables of tenants: keys, what each tenant used, and the audit. In the registry's database.

Keys and audit belong to all bases together; usage to the base (`scope`) that was used. The audit
only grows: triggers refuse every change of a row, whoever asks.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Column, Connection, Index, Integer, String, Table, Text, event

from loraplex_server.adapters.registry_tables import metadata

api_keys: Final = Table(
    "api_keys",
    metadata,
    Column("id", String().with_variant(String(collation="C"), "postgresql"), primary_key=True),
    Column("name", String, nullable=False),
    Column("role", String, nullable=False),
    Column("tenant", String, nullable=False),
    Column("secret_sha256", String, nullable=False, unique=True),
    Column("created", BigInteger, nullable=False),
    Column("expires", BigInteger),
    Column("last_used", BigInteger),
    Column("revoked", BigInteger),
)

#: One row that counts changes of `api_keys`: servers read it to know whether to read keys again.
key_changes: Final = Table(
    "key_changes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("count", BigInteger, nullable=False),
)

usage: Final = Table(
    "usage",
    metadata,
    Column("scope", String, primary_key=True),
    Column("hour", BigInteger, primary_key=True),  # Unix time of its beginning
    Column("tenant", String, primary_key=True),
    Column("adapter", String, primary_key=True),  # "" is the base model
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
)

#: The last batch of usage that each process has written, so that none is added twice.
usage_writers: Final = Table(
    "usage_writers",
    metadata,
    Column("id", String, primary_key=True),
    Column("last_batch", BigInteger, nullable=False),
    Column("written", BigInteger, nullable=False),
)

audit: Final = Table(
    "audit",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("time", BigInteger, nullable=False),
    Column("actor", String, nullable=False),
    Column("tenant", String, nullable=False),
    Column("action", String, nullable=False),
    Column("subject", String, nullable=False),
    Column("adapter_id", String),
    Column("request_id", String),
    Column("details", Text, nullable=False),
    sqlite_autoincrement=True,  # an id is never given twice
)

Index("audit_of_tenant", audit.c.tenant, audit.c.id)
Index("audit_of_subject", audit.c.subject, audit.c.id)

#: By database: what makes it refuse every change of what was written.
_GUARDS: Final = {
    "sqlite": [
        f"CREATE TRIGGER audit_refuses_{verb} BEFORE {verb} ON audit "
        "BEGIN SELECT RAISE(ABORT, 'the audit is append-only'); END"
        for verb in ("UPDATE", "DELETE")
    ],
    "postgresql": [
        "CREATE OR REPLACE FUNCTION loraplex_refuse_audit_change() RETURNS trigger "
        "LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'the audit is append-only'; END $$",
        "CREATE TRIGGER audit_refuses_changes BEFORE UPDATE OR DELETE OR TRUNCATE ON audit "
        "FOR EACH STATEMENT EXECUTE FUNCTION loraplex_refuse_audit_change()",
    ],
}


@event.listens_for(audit, "after_create")
def _guard_audit(table: Table, connection: Connection, **_: object) -> None:
    for statement in _GUARDS[connection.dialect.name]:
        connection.exec_driver_sql(statement)
