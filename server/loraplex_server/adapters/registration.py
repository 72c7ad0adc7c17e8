"""What whoever registers an adapter asks for, beside the adapter itself. Data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from loraplex_server.adapters.defaults import AdapterDefaults

UPLOAD = "upload"


@dataclass(frozen=True)
class NameSettings:
    """What is kept for a name, whatever its version.

    Attributes:
        pinned: stays in the pool once loaded, and never expires.
        ttl_s: deleted so long after its last use, or upload; None for never.
        defaults: for its requests.
    """

    pinned: bool = False
    ttl_s: int | None = None
    defaults: AdapterDefaults = field(default_factory=AdapterDefaults)


@dataclass(frozen=True)
class Registration:
    """One wish to have a folder served under a name.

    Attributes:
        check_base: refuse an adapter whose config names another base model.
        replace: make it a new version where the name has other content.
        expected_id: replace only that current content, and refuse otherwise.
        source: where it comes from, for the record: `upload`, or a URL without secrets.
        settings: new ones for the name, by field of `NameSettings`; others stay as they are.
    """

    name: str
    check_base: bool = True
    replace: bool = False
    expected_id: str | None = None
    source: str = UPLOAD
    settings: dict[str, Any] = field(default_factory=dict)
