"""Loading and unloading adapters for clients of other servers, whose endpoints name a path.

A path of theirs is a source of ours: below `adapter_root`, or a URL. "Loading" registers the
adapter; pages it takes when requests ask for it. "Unloading" deletes its name. Where keys exist,
all of this is for admins, who say whole names.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Final
from urllib.parse import quote

from starlette.requests import Request

from loraplex_server.adapters.audit_log import Actor
from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.errors import AdapterNotFound, PinRefused, SourceFailed
from loraplex_server.adapters.record import AdapterRecord
from loraplex_server.adapters.registration import UPLOAD
from loraplex_server.api.adapter_bodies import SourceBody
from loraplex_server.api.errors import AdapterDraining, AdapterMissing
from loraplex_server.api.models import all_adapters
from loraplex_server.api.removals import DRAIN_S, AdapterRemovals, RemovalMode
from loraplex_server.api.upkeep import Upkeep
from loraplex_server.api.uploads import AdapterUploads
from loraplex_server.engine.errors import EngineUnavailable
from loraplex_server.engine.handle import EngineHandle

_IS_URL: Final = re.compile(r"(file|https?|s3|gs|hf):", re.IGNORECASE)


class ForeignAdapters:
    """Used from the event loop."""

    def __init__(
        self,
        engine: EngineHandle,
        catalog: AdapterCatalog,
        uploads: AdapterUploads,
        removals: AdapterRemovals,
        upkeep: Upkeep,
        *,
        root: Path | None,
        pinned_share: float,
    ) -> None:
        """Args:
        root: of local paths.
        pinned_share: of the pool's pages, what pinned adapters may take together.
        """
        self._engine = engine
        self._catalog = catalog
        self._uploads = uploads
        self._removals = removals
        self._upkeep = upkeep
        self._root = root
        self._pinned_share = pinned_share

    async def is_loaded(self, name: str) -> bool:
        """Whether an adapter has the name; raises InvalidAdapterName if none could."""
        self._catalog.check_name(name)
        try:
            await asyncio.to_thread(self._catalog.get, name)
        except AdapterNotFound:
            return False
        return True

    async def load(self, name: str, path: str, *, replace: bool, request: Request) -> None:
        """Register what lies at `path`.

        Raises:
            AdapterMissing: nothing does.
            ClientDisconnect, AdapterError, ApiError: see `AdapterUploads.accept_source`.
        """
        body = SourceBody(name=name, source=source_of(path, self._root), replace=replace)
        try:
            record, _ = await self._uploads.accept_source(body, request)
        except SourceFailed as error:
            if isinstance(error.__cause__, FileNotFoundError):
                message = f"Loading lora {name} failed: No adapter found for {path}"
                raise AdapterMissing(message) from error
            raise
        if record.settings.pinned:
            await self._upkeep.keep_pinned()  # another version is current now

    async def pin(self, name: str, actor: Actor) -> None:
        """Keep a new adapter in the pool; where it cannot be kept, it is not loaded either.

        Raises:
            PinRefused, EngineUnavailable: and nothing has changed.
        """
        try:
            max_pages = int(self._engine.info.num_pages * self._pinned_share)
            change = {"pinned": True}
            await asyncio.to_thread(
                self._catalog.change, name, change, max_pinned_pages=max_pages, actor=actor
            )
        except (PinRefused, EngineUnavailable):
            await self.unload(name, actor)
            raise
        await self._upkeep.keep_pinned()

    async def unload(self, name: str, actor: Actor) -> None:
        """Delete a name; requests that run on it finish, and are waited for within reason.

        Raises:
            AdapterNotFound, StorageFailed
        """
        if "@" in name:  # a version, which their clients know nothing of
            raise AdapterNotFound(name)
        try:
            await self._removals.remove(name, RemovalMode.DRAIN, DRAIN_S, actor)
        except AdapterDraining:
            return  # gone for whoever asks, as it would be there

    async def loaded(self) -> dict[str, str]:
        """Return all adapters by name, with where each comes from."""
        records = await asyncio.to_thread(lambda: list(all_adapters(self._catalog)))
        return {record.name: _origin(record) for record in records}


def source_of(path: str, root: Path | None) -> str:
    """Return the URL of a source from what other servers call a path.

    Args:
        root: where relative paths begin; without it, any path is refused by whoever reads it.
    """
    return path if _IS_URL.match(path) else f"file://{quote(str((root or Path('/')) / path))}"


def _origin(record: AdapterRecord) -> str:
    return record.id if record.source == UPLOAD else record.source
