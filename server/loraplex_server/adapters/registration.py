"""What whoever registers an adapter asks for, beside the adapter itself. Data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from loraplex_server.adapters.audit_log import Actor
from loraplex_server.adapters.defaults import AdapterDefaults

UPLOAD = "upload"


@dataclass(frozen=True)
class NameSettings:
    """What is kept for a name, whatever its version.

    Attributes:
        pinned: stays in the pool once loaded, and never expires.
        ttl_s: deleted so long after its last use, or upload; None for never.
        defaults: for its requests.
        readers: tenants beside the owner who may use it, `*` for all; None for the rule: nobody
            of an owned name, and all of one without an owner.
    """

    pinned: bool = False
    ttl_s: int | None = None
    defaults: AdapterDefaults = field(default_factory=AdapterDefaults)
    readers: tuple[str, ...] | None = None


@dataclass(frozen=True)
class OwnerLimits:
    """What one owner may have registered; 0 for no limit.

    Attributes:
        max_adapters: names.
        max_bytes: of all versions together, the uploaded files included where they are kept.
    """

    max_adapters: int = 0
    max_bytes: int = 0


@dataclass(frozen=True)
class Registration:
    """One wish to have a folder served under a name.

    Attributes:
        check_base: refuse an adapter whose config names another base model.
        replace: make it a new version where the name has other content.
        expected_id: replace only that current content, and refuse otherwise.
        source: where it comes from, for the record: `upload`, or a URL without secrets.
        owner: of a new name, a tenant; "" for nobody.
        is_owners: refuse a name that is there and has another owner.
        limits: of the owner.
        actor: who asks, for the audit.
        settings: new ones for the name, by field of `NameSettings`; others stay as they are.
    """

    name: str
    check_base: bool = True
    replace: bool = False
    expected_id: str | None = None
    source: str = UPLOAD
    owner: str = ""
    is_owners: bool = False
    limits: OwnerLimits = OwnerLimits()
    actor: Actor = field(default_factory=Actor)
    settings: dict[str, Any] = field(default_factory=dict)
