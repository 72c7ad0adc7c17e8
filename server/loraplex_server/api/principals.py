"""Who asks, as the guard found out: where the other parts of the API read it."""

from __future__ import annotations

from typing import Final

from starlette.requests import HTTPConnection

from loraplex_server.adapters.audit_log import LOCAL, Actor
from loraplex_server.api.envelope import REQUEST_ID_KEY
from loraplex_server.tenants.namespace import Namespace
from loraplex_server.tenants.principal import ANYBODY, Principal

#: Where the principal is in the ASGI scope; nowhere where a path needs no key.
PRINCIPAL_KEY: Final = "loraplex.principal"


def principal_of(request: HTTPConnection) -> Principal:
    """Return who asks; raises KeyError on a path that needs no key."""
    principal = request.scope[PRINCIPAL_KEY]
    assert isinstance(principal, Principal), "the guard puts nothing else there"
    return principal


def namespace_of(request: HTTPConnection) -> Namespace:
    """Return the adapters as whoever asks sees them."""
    return Namespace(principal_of(request))


def actor_of(request: HTTPConnection) -> Actor:
    """Return whom the audit names."""
    key_id = principal_of(request).key_id
    return Actor(LOCAL if key_id is None else key_id, request.scope.get(REQUEST_ID_KEY))


__all__ = ["ANYBODY", "PRINCIPAL_KEY", "actor_of", "namespace_of", "principal_of"]
