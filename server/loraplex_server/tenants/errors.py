"""Errors of keys and tenants.

TenantError
├── KeyNotFound       no live key has this id
├── InvalidKeyWish    such a key cannot be made
└── InvalidCursor     `after` is not what an earlier answer gave
"""

from __future__ import annotations


class TenantError(Exception):
    """Base of everything this package raises on purpose; `param` names the offending field."""

    param: str | None = None


class KeyNotFound(TenantError):
    """No live key has the id."""

    def __init__(self, key_id: str) -> None:
        super().__init__(
            f"no key has the id {key_id[:64]!r}, or it was revoked already; `loraplex keys list` "
            "and GET /v1/keys show those that there are"
        )


class InvalidKeyWish(TenantError):
    """Such a key cannot be made; the message says why, and what can."""

    def __init__(self, reason: str, *, param: str) -> None:
        self.param = param
        super().__init__(reason)


class InvalidCursor(TenantError):
    """A page was asked for behind what no earlier page ended with."""

    param = "after"

    def __init__(self, cursor: str) -> None:
        super().__init__(f"`after` must be `last` of an earlier answer, not {cursor[:64]!r}")
