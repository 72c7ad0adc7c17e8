"""One replica: a whole server without a socket, in an actor of Ray's.

Owned by Serve, which calls everything here in one event loop. The engine is a process of its own
below it, as everywhere, and ends with it however that happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Final

import ray
from ray import serve
from starlette.types import Message

from loraplex_server.adapters.data_dir import storage_errors
from loraplex_server.adapters.registry_database import wait_for_database
from loraplex_server.api.app import create_app, running
from loraplex_server.api.services import start_services
from loraplex_server.build import build_engine_handle, resolve_facts
from loraplex_server.config import Config, ConfigError
from loraplex_server.engine.messages import EngineState
from loraplex_server.logs import set_up_logging
from loraplex_server.ray_serve.adapter_key import is_worth_knowing
from loraplex_server.ray_serve.answer_pipe import WholeAnswer, answer_messages, whole_answer
from loraplex_server.ray_serve.data_folder import ClaimedFolder
from loraplex_server.ray_serve.forwarded import ForwardedRequest
from loraplex_server.tenants.key_database import has_keys

#: Adapters that the router may know of at one replica. The engine pages as many as there are; this
#: bounds what Serve's controller sends to every router whenever one of them changes.
MAX_KNOWN_ADAPTERS: Final = 512
#: So long an engine may be away before the whole replica is replaced. It restarts by itself.
_SICK_S: Final = 300.0
#: How often requests that wait for it look again.
_LOOK_S: Final = 0.05


class Replica:
    """Made by Serve; raises what `loraplex serve` would end with."""

    async def __init__(self, config: Config) -> None:  # type: ignore[misc]  # Serve awaits it
        set_up_logging(config.log_level, config.log_format)
        self._name = serve.get_replica_context().replica_tag
        self._open = contextlib.AsyncExitStack()
        try:
            await self._start(_fitted(config))
        except BaseException:
            await self._open.aclose()
            raise

    async def _start(self, config: Config) -> None:
        is_alone = config.registry_url is None
        claim = ClaimedFolder.the_only_one if is_alone else ClaimedFolder.first_free
        with storage_errors("claim a data folder"):
            folder = await asyncio.to_thread(claim, config.data_dir)
        self._open.callback(folder.close)
        config = replace(config, data_dir=folder.path)
        if config.registry_url is not None:
            await asyncio.to_thread(wait_for_database, config.registry_url, config.registry_wait_s)
        await asyncio.to_thread(_refuse_if_open, config)
        facts = await asyncio.to_thread(resolve_facts, config)
        self._engine = build_engine_handle(config, facts)
        self._open.push_async_callback(self._engine.stop)
        services = await start_services(config, facts, self._engine)
        self._open.push_async_callback(asyncio.to_thread, services.catalog.close)
        self._base_names = services.base_names
        self._app = create_app(services)
        await self._open.enter_async_context(running(self._app))
        self._well_at_s = time.monotonic()

    async def __del__(self) -> None:
        """Called by Serve when the last request has ended, or may take no longer."""
        await self._open.aclose()

    async def check_health(self) -> None:
        """Called by Serve; raising makes it replace the replica."""
        now_s = time.monotonic()
        if self._engine.state is EngineState.READY:
            self._well_at_s = now_s
        elif now_s - self._well_at_s > _SICK_S:
            state = self._engine.state.value
            raise RuntimeError(f"the engine is {state} for {now_s - self._well_at_s:.0f} s")

    async def base_names(self) -> tuple[str, ...]:
        """Return what requests may call the base model."""
        return self._base_names

    async def answer(self, request: ForwardedRequest) -> AsyncIterator[list[Message]]:
        """Yield the answer to a request, as ASGI's messages, whatever there is at once."""
        key = serve.get_multiplexed_model_id()
        if request.scope["method"] == "POST":
            await self._until_ready()
        is_news = is_worth_knowing(request.scope["method"], key)
        async with contextlib.aclosing(answer_messages(self._app, request)) as answer:
            async for messages in answer:
                if is_news and messages[0].get("status", 500) < 400:
                    await self._known_adapter(key)
                yield messages

    async def _until_ready(self) -> None:
        """Wait while the engine starts again, for as long as the front waits.

        Who refuses at once has least to do, and would be given all requests; and those for adapters
        that it is known for come back to it however often they are told to ask another.
        """
        coming = (EngineState.STARTING, EngineState.RESTARTING)
        while self._engine.state in coming:  # noqa: ASYNC110  (it has no event to wait for)
            await asyncio.sleep(_LOOK_S)

    async def answer_whole(self, request: ForwardedRequest) -> tuple[str, WholeAnswer]:
        """Return the replica's name, and its answer once that is complete."""
        return self._name, await whole_answer(self._app, request)

    @serve.multiplexed(max_num_models_per_replica=MAX_KNOWN_ADAPTERS)
    async def _known_adapter(self, key: str) -> str:
        """Let the router know that this replica has answered with an adapter.

        Nothing is loaded by this: the engine has done that, and pages adapters by rules of its own.
        Asked after an answer began, not before, so that names that nobody has are never known.
        """
        return key


def _fitted(config: Config) -> Config:
    """Return the settings for what Serve gave this replica.

    Raises:
        ConfigError: replicas would not know of each other's adapters.
    """
    deployment = serve.get_replica_context()._deployment_config
    scaling = deployment.autoscaling_config
    most = scaling.max_replicas if scaling is not None else deployment.num_replicas
    if most > 1 and config.registry_url is None:
        raise ConfigError(
            "several replicas need a registry and files that they share: set LORAPLEX_REGISTRY_URL "
            "and blob_url, or num_replicas to 1"
        )
    given = ray.get_runtime_context().get_assigned_resources()
    threads = config.threads or max(1, int(given.get("CPU", 1)))
    # A GPU that Ray has not given to this replica is somebody else's.
    here = "cuda" if given.get("GPU", 0) >= 1 else "cpu"
    device = here if config.device == "auto" else config.device
    return replace(config, threads=threads, device=device)


def _refuse_if_open(config: Config) -> None:
    """Serve's proxies listen where they are told to, which nobody here knows."""
    if config.allow_open or has_keys(config):
        return
    raise ConfigError(
        "this application has no API keys: set LORAPLEX_API_KEY, an admin's, in the environment "
        "that it is built in; or, where only you reach Serve's port, give allow_open=on"
    )
