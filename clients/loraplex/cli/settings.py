"""Where the server is, as the global options say."""

from __future__ import annotations

from dataclasses import dataclass

import httpx
import typer

from loraplex.async_client import AsyncClient
from loraplex.client import Client
from loraplex.errors import UsageError


@dataclass(frozen=True)
class Settings:
    """The global options. Made once by the root command, read by the others."""

    base_url: str
    api_key: str | None

    def client(self) -> Client:
        """Return a client of the server; the caller closes it."""
        return Client(base_url=self.base_url, api_key=self.api_key)

    def async_client(self, timeout_s: float) -> AsyncClient:
        """Return a client that opens any number of connections and tries nothing twice."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return AsyncClient(
            base_url=self.base_url,
            api_key=self.api_key,
            timeout=timeout_s,
            max_retries=0,
            limits=limits,
        )


def settings_of(ctx: typer.Context) -> Settings:
    """Return the options that the root command left in the context."""
    settings = ctx.find_object(Settings)
    if settings is None:
        raise UsageError("this command runs under `loraplex`")
    return settings


def open_client(ctx: typer.Context) -> Client:
    """Return a client with the options that the root command left in the context."""
    return settings_of(ctx).client()
