"""Which adapters a tenant may name, and how.

An adapter of the tenant T is registered as `T/name`; T says `name` or `T/name`. Adapters without an
owner are shared: all may use them, or those whom `readers` names. Admins say whole names and see
everything, and so does everybody on a server without keys.
"""

from __future__ import annotations

from collections.abc import Iterator

from loraplex_server.adapters.record import EVERYBODY, AdapterRecord
from loraplex_server.tenants.principal import Principal


class Namespace:
    """The adapters as one principal sees them; immutable."""

    def __init__(self, principal: Principal) -> None:
        self._is_admin = principal.is_admin
        self._tenant = principal.tenant

    @property
    def reader(self) -> str | None:
        """The tenant whose view this is; None sees everything."""
        return None if self._is_admin else self._tenant

    def readings(self, name: str) -> Iterator[str]:
        """Return what a name can mean, best first: the tenant's own adapter comes before others."""
        if not self._is_admin and not self._is_own(name):
            yield f"{self._tenant}/{name}"
        yield name

    def name_for(self, name: str) -> str:
        """Return the name under which an adapter is registered that is to be called so."""
        if self._is_admin or self._is_own(name):
            return name
        return f"{self._tenant}/{name}"

    def may_read(self, record: AdapterRecord) -> bool:
        """Whether the adapter may be used, or even be known of."""
        if self._is_admin or self.may_change(record):
            return True
        return EVERYBODY in record.readers or self._tenant in record.readers

    def may_change(self, record: AdapterRecord) -> bool:
        """Whether the adapter is one's own."""
        return self._is_admin or (bool(self._tenant) and record.owner == self._tenant)

    def _is_own(self, name: str) -> bool:
        return name.startswith(f"{self._tenant}/")
