"""Who may ask: whoever brings the key, and no web page of somebody else's."""

from __future__ import annotations

import secrets
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from loraplex_server.api.error_table import error_response
from loraplex_server.api.errors import CrossSiteRefused, InvalidApiKey

#: For probes and scrapers, which say nothing of any tenant.
_OPEN_PATHS: Final = frozenset({"/health", "/metrics", "/ready", "/ping", "/load"})
_CHANGING_METHODS: Final = frozenset({"POST", "PATCH", "DELETE"})


class Guard:
    """ASGI middleware; answers by itself what it refuses, before any of the body is read."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._api_key = api_key.encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await error_response(error)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Exception | None:
        headers = Headers(scope=scope)
        # Browsers let any page send a form; they also say that they do.
        is_cross_site = headers.get("sec-fetch-site") == "cross-site"
        if is_cross_site and scope["method"] in _CHANGING_METHODS:
            return CrossSiteRefused("requests from the web pages of other sites are refused")
        if self._api_key is None or scope["path"] in _OPEN_PATHS:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        is_known = secrets.compare_digest(given.strip().encode(), self._api_key)
        if scheme.lower() == "bearer" and is_known:
            return None
        return InvalidApiKey("send the server's API key as `Authorization: Bearer KEY`")
