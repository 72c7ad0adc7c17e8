"""Who asks: whoever brings a key, and no web page of somebody else's."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex_server.adapters.errors import StorageFailed
from loraplex_server.api.error_table import error_response
from loraplex_server.api.errors import ApiError, CrossSiteRefused, InvalidApiKey
from loraplex_server.api.principals import PRINCIPAL_KEY
from loraplex_server.api.tenant_header import ACCOUNT_KEY, TenantHeader
from loraplex_server.tenants.api_key import ApiKey
from loraplex_server.tenants.key_ring import KeyRing
from loraplex_server.tenants.principal import ANYBODY, Principal

_CHANGING_METHODS: Final = frozenset({"POST", "PUT", "PATCH", "DELETE"})
#: Ends of names that nobody can register.
_OWN_DOMAINS: Final = (".localhost", ".local", ".internal")
#: Of a name in a message.
_SHOWN_CHARS: Final = 256
_HOW: Final = "send an API key as `Authorization: Bearer KEY`, or as `x-api-key: KEY`"


class Guard:
    """ASGI middleware; answers by itself what it refuses, before any of the body is read.

    What the principal may do is for `access` to say, once the endpoint is known.

    Args:
        open_paths: which need no key.
        limit_headers: what to tell a tenant of its limits, with each answer that it pays for; None
            where nobody has any.
        is_open: without keys, let everybody in under whatever name the server is called.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyRing,
        tenant_header: TenantHeader,
        open_paths: frozenset[str],
        limit_headers: Callable[[str], Mapping[str, str]] | None,
        is_open: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._app = app
        self._keys = keys
        self._tenant_header = tenant_header
        self._open_paths = open_paths
        self._limit_headers = limit_headers
        self._is_open = is_open
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            await self._admit(scope)
        except (ApiError, StorageFailed) as error:
            await error_response(error)(scope, receive, send)
            return
        limit_headers = self._limit_headers
        if limit_headers is not None:  # else no chunk of a stream pays for it
            send = _with_limits(limit_headers, scope, send)
        await self._app(scope, receive, send)

    async def _admit(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        # Browsers let any page send a form; they also say that they do.
        is_cross_site = headers.get("sec-fetch-site") == "cross-site"
        if is_cross_site and scope["method"] in _CHANGING_METHODS:
            raise CrossSiteRefused("requests from the web pages of other sites are refused")
        if scope["path"] not in self._open_paths:
            try:
                scope[PRINCIPAL_KEY] = await self._principal(headers)
            except StorageFailed as error:
                # Where the database is and who logs in there is not for whoever comes along; the
                # key ring has logged it.
                raise StorageFailed(
                    "keys cannot be looked up now, as the server's database does not answer; try "
                    "again shortly, and see the server's log"
                ) from error

    async def _principal(self, headers: Headers) -> Principal:
        if not await self._keys.is_on():
            if not self._is_open:
                _check_host(headers.get("host", ""))
            return ANYBODY
        secret = _secret_of(headers)
        key = await self._keys.find(secret) if secret else None
        if key is None:
            reason = "this key is unknown, or was revoked" if secret else "there is no key"
            raise InvalidApiKey(f"{reason}; {_HOW}")
        self._check_expiry(key)
        return self._tenant_header.applied(key.principal, headers)

    def _check_expiry(self, key: ApiKey) -> None:
        if key.has_expired(self._clock()):
            raise InvalidApiKey("this key has expired; ask an admin of the server for another one")


def _check_host(host: str) -> None:
    """Refuse a name that somebody else may own; raises CrossSiteRefused.

    A server without keys is on this machine alone; but a web page can have its own domain stand for
    this machine's address ("DNS rebinding"), and then asks from what browsers take for one site.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        name = host
    if "." not in name and ":" not in name:  # `localhost`, or a name of one's own network
        return
    if not name.endswith(_OWN_DOMAINS) and not _is_address(name):
        raise CrossSiteRefused(
            f"without keys, this server is not reached as {name[:_SHOWN_CHARS]!r}, lest a web page "
            "that calls itself so uses it: ask localhost or an IP address, make keys, or set "
            "allow_open"
        )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _with_limits(
    limit_headers: Callable[[str], Mapping[str, str]], scope: Scope, send: Send
) -> Send:
    def send_with_limits(message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start" and ACCOUNT_KEY in scope:
            limits = limit_headers(scope[ACCOUNT_KEY])
            more = [(name.encode(), value.encode()) for name, value in limits.items()]
            message["headers"] = [*message.get("headers", ()), *more]
        return send(message)

    return send_with_limits


def _secret_of(headers: Headers) -> str:
    """Return the key that a request brings, "" if none; raises InvalidApiKey if two."""
    given = set(headers.getlist("x-api-key"))
    for value in headers.getlist("authorization"):
        scheme, _, credentials = value.partition(" ")
        if scheme.lower() == "bearer":
            given.add(credentials)
    found = {secret.strip() for secret in given} - {""}
    if len(found) > 1:
        raise InvalidApiKey("the request brings several keys; send one of them")
    return found.pop() if found else ""
