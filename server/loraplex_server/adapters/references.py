"""How a request names an adapter: `name`, or `name@sha256:<hex>` for exactly one version of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from loraplex_server.adapters.errors import AdapterNotFound, InvalidAdapterName
from loraplex_server.adapters.identity import ID_PREFIX
from loraplex_server.adapters.names import MAX_NAME_LEN

MIN_DIGITS: Final = 12
#: Of a name or version in a message.
_SHOWN_CHARS: Final = 256

_DIGITS: Final = re.compile(r"[0-9a-f]{1,64}")


@dataclass(frozen=True)
class AdapterReference:
    """`id_prefix` is the id, or the beginning of one; None for the current version."""

    name: str
    id_prefix: str | None = None

    def __str__(self) -> str:
        return self.name if self.id_prefix is None else f"{self.name}@{self.id_prefix}"


def parse_reference(text: str) -> AdapterReference:
    """Return what `text` refers to.

    Raises:
        InvalidAdapterName: there is an `@`, and behind it no digest of at least `MIN_DIGITS`.
        AdapterNotFound: no adapter can have such a name; no database needs to see it.
    """
    name, at, digest = text.partition("@")
    if len(name) > MAX_NAME_LEN or not name.isascii() or "\0" in name:
        raise AdapterNotFound(text[:_SHOWN_CHARS])
    if not at:
        return AdapterReference(name)
    return AdapterReference(name, check_id_prefix(text, digest))


def check_id_prefix(text: str, digest: str) -> str:
    """Return `digest` in the form of ids; raises InvalidAdapterName, quoting `text`."""
    digits = digest.removeprefix(ID_PREFIX).lower()
    if not (digest.startswith(ID_PREFIX) and _DIGITS.fullmatch(digits)):
        raise InvalidAdapterName(text, f"a version is named by '@{ID_PREFIX}' and hex digits")
    if len(digits) < MIN_DIGITS:
        raise InvalidAdapterName(text, f"a digest needs at least {MIN_DIGITS} digits")
    return ID_PREFIX + digits
