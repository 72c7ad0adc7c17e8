"""API keys: what is known of one, and its secret, which is known to its holder alone."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Final

from loraplex_server.tenants.errors import InvalidKeyWish
from loraplex_server.tenants.principal import Principal, Role, is_tenant_name

SECRET_PREFIX: Final = "lp-"
_SECRET_BYTES: Final = 32
_MAX_NAME_CHARS: Final = 128
#: A hundred years.
MAX_EXPIRY_S: Final = 3_155_760_000


@dataclass(frozen=True)
class ApiKey:
    """One key, without its secret. Times are Unix seconds; `expires` None is never."""

    key_id: str
    name: str
    role: Role
    tenant: str
    created: int
    expires: int | None = None
    last_used: int | None = None

    @property
    def principal(self) -> Principal:
        return Principal(self.tenant, self.role, self.key_id)

    def as_json(self) -> dict[str, str | int | None]:
        """Return what may be told of it, which is all that it holds."""
        return {
            "id": self.key_id,
            "name": self.name,
            "role": self.role.value,
            "tenant": self.tenant,
            "created": self.created,
            "expires": self.expires,
            "last_used": self.last_used,
        }

    def has_expired(self, now: float) -> bool:
        return self.expires is not None and self.expires <= now


@dataclass(frozen=True)
class KeyWish:
    """A key that somebody wants.

    Attributes:
        name: for people.
        expires_in_s: seconds from now; None for never.
    """

    name: str
    role: Role
    tenant: str = ""
    expires_in_s: int | None = None

    def check(self) -> None:
        """Raise InvalidKeyWish where there can be no such key."""
        if not 1 <= len(self.name) <= _MAX_NAME_CHARS or not self.name.isprintable():
            raise InvalidKeyWish(
                f"`name` must be 1 to {_MAX_NAME_CHARS} printable characters", param="name"
            )
        if self.tenant and not is_tenant_name(self.tenant):
            raise InvalidKeyWish(
                "`tenant` must be 1 to 64 ASCII letters, digits or any of . _ - and begin with a "
                "letter or a digit: it begins the names of its adapters",
                param="tenant",
            )
        if not self.tenant and self.role is not Role.ADMIN:
            raise InvalidKeyWish(
                f"a key of the role {self.role.value} belongs to a tenant: give `tenant`",
                param="tenant",
            )
        if self.expires_in_s is not None and not 1 <= self.expires_in_s <= MAX_EXPIRY_S:
            raise InvalidKeyWish(
                f"`expires_in_s` must be 1 to {MAX_EXPIRY_S} seconds", param="expires_in_s"
            )


def new_secret() -> str:
    """Return a secret of 256 random bits, which a header, a URL and a shell take as it is."""
    return SECRET_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)


def new_key_id(now: float) -> str:
    """Return an id; later ones sort behind earlier ones, to the millisecond."""
    return f"key_{int(now * 1000):012x}{secrets.token_hex(4)}"


def digest_of(secret: str) -> str:
    """Return what is kept of a secret.

    One round of SHA-256: whoever reads it would have to try 2^255 secrets, so a slow hash would
    only cost every request. Looking a digest up takes a time that depends on the digest, which says
    nothing of any secret that is not known already.
    """
    return hashlib.sha256(secret.encode()).hexdigest()
