"""Whose a new adapter is, under which name, and within which limits."""

from __future__ import annotations

from dataclasses import replace

from starlette.requests import HTTPConnection

from loraplex_server.adapters.errors import SourceForbidden
from loraplex_server.adapters.registration import OwnerLimits, Registration
from loraplex_server.adapters.sources.source import SourcePolicy
from loraplex_server.api.principals import actor_of, namespace_of, principal_of
from loraplex_server.setting_values import TenantLimit, limit_of
from loraplex_server.tenants.key_ring import KeyRing
from loraplex_server.tenants.principal import Principal


class AdapterOwners:
    """Immutable; used from the event loop.

    Args:
        max_adapters, max_bytes: of one tenant, see `OwnerLimits`.
    """

    def __init__(self, keys: KeyRing, max_adapters: TenantLimit, max_bytes: TenantLimit) -> None:
        self._keys = keys
        self._max_adapters = max_adapters
        self._max_bytes = max_bytes

    async def owned(self, wish: Registration, request: HTTPConnection) -> Registration:
        """Return the wish with its whole name and its owner.

        What an admin registers as `T/name` belongs to T, if T is a tenant of any key.
        """
        principal = principal_of(request)
        name, owner = namespace_of(request).name_for(wish.name), principal.tenant
        if principal.is_admin:
            tenants = (await self._keys.current()).tenants
            first, slash, _ = name.partition("/")
            owner = first if slash and first in tenants else ""
        limits = OwnerLimits(limit_of(self._max_adapters, owner), limit_of(self._max_bytes, owner))
        return replace(
            wish,
            name=name,
            owner=owner,
            limits=limits,
            is_owners=not principal.is_admin,
            actor=actor_of(request),
        )


def policy_for(principal: Principal, policy: SourcePolicy, url: str) -> SourcePolicy:
    """Return where the server may read from for somebody; raises SourceForbidden.

    For tenants it reads what anybody on the internet could: neither its own disk and network, nor
    what its credentials open.
    """
    if principal.is_admin:
        return policy
    if not url.lower().startswith("https:"):
        raise SourceForbidden(
            "only admins may have the server read with its own rights; upload the adapter, or give "
            "an https: source"
        )
    return SourcePolicy(root=None, allow_private=False)
