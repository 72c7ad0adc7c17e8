"""On whose account a request runs: its key's tenant's, or as a gateway in front of the server says.

Where keys exist, a gateway brings an admin's key and names in the header for whom it asks: the
request is then that tenant's uploader's, and no admin's. Nobody else may name another tenant.
"""

from __future__ import annotations

import re
from typing import Final

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection

from loraplex_server.api.errors import InvalidTenant, TenantForbidden
from loraplex_server.api.principals import principal_of
from loraplex_server.tenants.principal import Principal, Role, is_tenant_name

#: Where the account of a request that generates is in the ASGI scope.
ACCOUNT_KEY: Final = "loraplex.account"

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

    def account_of(self, request: HTTPConnection) -> str:
        """Return whose account a request runs on, and leave it in its scope.

        Raises:
            InvalidTenant
        """
        principal = principal_of(request)
        is_keyless = principal.key_id is None
        tenant = self.read(request.headers) if is_keyless else principal.tenant
        request.scope[ACCOUNT_KEY] = tenant
        return tenant

    def applied(self, principal: Principal, headers: Headers) -> Principal:
        """Return for whom the holder of a key asks.

        Raises:
            InvalidTenant: the header holds no name that a tenant of keys can have.
            TenantForbidden: another tenant's, by a key that is no admin's.
        """
        tenant = self.read(headers)
        if not tenant or (tenant == principal.tenant and not principal.is_admin):
            return principal
        if not is_tenant_name(tenant):
            raise InvalidTenant(
                f"with keys, the header {self._name} must be ASCII letters, digits or any of . _ -"
            )
        if not principal.is_admin:
            raise TenantForbidden(
                f"this key is of the tenant {principal.tenant!r}, and only an admin's may name "
                f"another in the header {self._name}; leave the header out"
            )
        return Principal(tenant, Role.UPLOADER, principal.key_id)
