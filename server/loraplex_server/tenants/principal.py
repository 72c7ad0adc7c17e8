"""Who asks: a tenant in a role, known by a key."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

#: The `api_key` of the settings, where a key's id stands.
SETTING_KEY_ID: Final = "api_key"

#: No `/`: it ends a tenant's name in front of its adapters'. A part of a name as adapters have it.
_TENANT: Final = re.compile(r"[A-Za-z0-9](?!.*\.\.)[A-Za-z0-9._-]{0,63}")


class Role(StrEnum):
    """What a key may do; each may do all that those before it may."""

    USER = "user"
    UPLOADER = "uploader"
    ADMIN = "admin"

    def includes(self, needed: Role) -> bool:
        """Whether whoever has this role may do what needs the other."""
        order = list(Role)
        return order.index(self) >= order.index(needed)


@dataclass(frozen=True)
class Principal:
    """Who asks.

    Attributes:
        tenant: whose account it is, and whose adapters; "" is nobody's in particular.
        key_id: None where no keys exist, and everybody may do everything.
    """

    tenant: str
    role: Role
    key_id: str | None

    @property
    def is_admin(self) -> bool:
        return self.role is Role.ADMIN


#: Everybody, on a server without keys.
ANYBODY: Final = Principal("", Role.ADMIN, None)


def is_tenant_name(name: str) -> bool:
    """Whether a tenant of keys can be called so: its name begins the names of its adapters."""
    return _TENANT.fullmatch(name) is not None
