"""The registry's tables: names, their versions, and the immutable adapters these stand for.

    names  1 --- n  versions  n --- 1  adapters

A name belongs to one base model (`scope`), so one registry can serve another base later without
ever offering it adapters of the first. What depends on settings (pages) is not stored.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata: Final = MetaData()

#: Ordered by code points everywhere: the order of names is the API's cursor.
_Name: Final = String().with_variant(String(collation="C"), "postgresql")

schema_version: Final = Table(
    "schema_version", metadata, Column("version", Integer, primary_key=True)
)

#: One row: what this registry signs its adapters' files with, see `BlobStore.claim`.
registry_identity: Final = Table(
    "registry_identity", metadata, Column("id", String, primary_key=True)
)

adapters: Final = Table(
    "adapters",
    metadata,
    Column("id", String, primary_key=True),
    Column("spec", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("native_bytes", BigInteger, nullable=False),
    Column("self_test_error", Float),
)

names: Final = Table(
    "names",
    metadata,
    Column("scope", String, primary_key=True),
    Column("name", _Name, primary_key=True),
    Column("current", Integer, nullable=False),
    Column("last_version", Integer, nullable=False),
    Column("last_used", BigInteger),
    Column("active", BigInteger, nullable=False),  # last use, registration or rollback
    Column("pinned", Boolean, nullable=False),
    Column("ttl_s", BigInteger),
    Column("defaults", Text, nullable=False),
    Column("owner", String, nullable=False, server_default=""),  # a tenant; "" is nobody's
    Column("readers", Text),  # JSON list of tenants; null is the owner, or all if it has none
)

versions: Final = Table(
    "versions",
    metadata,
    Column("scope", String, primary_key=True),
    Column("name", _Name, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("adapter_id", String, ForeignKey("adapters.id"), nullable=False, index=True),
    Column("base_model", String, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("source", String, nullable=False),
    Column("report", Text, nullable=False),
    UniqueConstraint("scope", "name", "adapter_id"),
)

#: What was changed lately, for other servers to follow: see `name_changes`. No references, as what
#: a row tells of may be gone.
name_changes: Final = Table(
    "name_changes",
    metadata,
    # Not a sequence: ids have no gaps, and are given in the order of the commits.
    Column(
        "id",
        BigInteger().with_variant(Integer, "sqlite"),
        primary_key=True,
        autoincrement=False,
    ),
    Column("scope", String, nullable=False),
    Column("name", _Name, nullable=False),
    Column("removed", Text, nullable=False),  # JSON list of ids that the name had
    Column("gone", Text, nullable=False),  # JSON list of those that no name has any more
    Column("cancels", Boolean, nullable=False),
    Column("time", BigInteger, nullable=False),
)

Index("names_that_expire", names.c.scope, names.c.ttl_s)
Index("names_pinned", names.c.scope, names.c.pinned)
Index("names_owned", names.c.scope, names.c.owner)
