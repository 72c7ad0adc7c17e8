"""On whose account a request runs, as a gateway in front of this server says."""

from __future__ import annotations

import re
from typing import Final

from starlette.datastructures import Headers

from loraplex_server.api.errors import InvalidTenant

MAX_TENANT_CHARS: Final = 64
#: No blanks, quotes or commas: a tenant is also a key in settings and logs.
_USABLE: Final = re.compile(rf"[A-Za-z0-9._:@/-]{{1,{MAX_TENANT_CHARS}}}")


class TenantHeader:
    """Reads the tenant; immutable.

    A name that cannot be used is refused and not mended, since two tenants must never become one.

    Args:
        name: of the header; None where everybody is one tenant, called "".
    """

    def __init__(self, name: str | None) -> None:
        self._name = name

    def read(self, headers: Headers) -> str:
        """Return the tenant; "" if the header is not there.

        Raises:
            InvalidTenant: the header is there twice, or holds what cannot be a tenant.
        """
        if self._name is None:
            return ""
        values = headers.getlist(self._name)
        if not values:
            return ""
        if len(values) > 1:
            # A client's own beside the gateway's: nobody can tell which one is true.
            raise InvalidTenant(f"the header {self._name} is given {len(values)} times")
        if not _USABLE.fullmatch(values[0]):
            raise InvalidTenant(
                f"the header {self._name} must be 1 to {MAX_TENANT_CHARS} ASCII letters, digits or "
                "any of . _ : @ / -"
            )
        return values[0]
