"""What the HTTP application needs, and how it is built from the settings."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraplex_server.adapters.base_identity import base_identity
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.folder_reader import FolderReader
from loraplex_server.adapters.record import AdapterLimits
from loraplex_server.adapters.storage_places import StoragePlaces
from loraplex_server.config import Config
from loraplex_server.engine.handle import EngineHandle
from loraplex_server.logs import without_password
from loraplex_server.model.errors import CheckpointError
from loraplex_server.model.source import ModelSource
from loraplex_server.text.vocabulary import Vocabulary

if TYPE_CHECKING:  # or whoever imports the API would import the model too
    from loraplex_server.build import ModelFacts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Services:
    """The parts that outlive a request; made once, handed to `create_app`.

    Attributes:
        base_names: what requests may call the base model; the first is shown.
        clock: the one the engine reads too, in seconds.
    """

    config: Config
    engine: EngineHandle
    catalog: AdapterCatalog
    vocabulary: Vocabulary
    base_names: tuple[str, ...]
    clock: Callable[[], float] = time.monotonic


async def start_services(config: Config, facts: ModelFacts, engine: EngineHandle) -> Services:
    """Start the engine, and load beside it what the API needs.

    The engine is the caller's to stop, the catalogue to close.

    Raises:
        AdapterError, EngineError, ModelError: something cannot be had; nothing is left open.
    """
    loop = asyncio.get_running_loop()

    def discard(adapter_id: str) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(engine.discard_adapter, adapter_id)

    if config.blob_url is not None:  # whose library may wait for minutes
        where = without_password(config.blob_url)
        log.info("opening the registry, and the adapters' files at %s", where)
    catalog = await asyncio.to_thread(build_catalog, config, facts, discard)
    log.info("loading %s", facts.base_name)
    try:
        vocabulary, _ = await asyncio.gather(
            asyncio.to_thread(build_vocabulary, facts), engine.start()
        )
        if (tokenizer := await asyncio.to_thread(vocabulary.to_json)) is not None:
            engine.learn_tokens(tokenizer)
    except BaseException:
        catalog.close()
        raise
    return Services(config, engine, catalog, vocabulary, base_names=(facts.base_name,))


def build_catalog(
    config: Config, facts: ModelFacts, on_discard: Callable[[str], None]
) -> AdapterCatalog:
    """Open the catalogue of the data folder; `on_discard` is called from any thread.

    Raises:
        StorageFailed: the data folder cannot be used.
        BaseNameTaken: an adapter in it has the base model's name.
        CheckpointError: the model's files cannot be read.
    """
    aliases = {facts.source.name, str(facts.source.path), config.model or ""}
    others = tuple(sorted(aliases - {facts.base_name, ""}))
    limits = AdapterLimits(
        max_rank=config.max_adapter_rank, max_upload_bytes=config.max_upload_bytes
    )
    return AdapterCatalog(
        data_dir=config.data_dir,
        pool_layout=facts.layout,
        base_name=facts.base_name,
        base_aliases=others,
        base_id=_base_id(facts.source),
        reader=FolderReader(
            BaseModel.open(facts.source, facts.spec), (facts.base_name, *others), limits
        ),
        places=StoragePlaces(
            config.registry_url, config.blob_url, config.registry_outage_s, config.copies_bytes
        ),
        keep_versions=config.keep_versions,
        limits=limits,
        on_discard=on_discard,
    )


def _base_id(source: ModelSource) -> str:
    try:
        if source.kind == "gguf":
            return base_identity([source.path])
        weights = sorted(source.path.glob("*.safetensors"))
        return base_identity([source.path / "config.json", *weights])
    except OSError as error:
        raise CheckpointError(path=str(source.path), reason=str(error)) from error


def build_vocabulary(facts: ModelFacts) -> Vocabulary:
    """Load the tokenizer, which takes seconds.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    return Vocabulary(facts.source.load_tokenizer(), size=facts.spec.vocab_size)
