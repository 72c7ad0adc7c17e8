"""The HTTP application: every endpoint, built over one set of services."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import version
from typing import Final

from fastapi import APIRouter, Depends, FastAPI

from loraplex_server.adapters.sources.source import SourcePolicy
from loraplex_server.api.access import METRICS_PATH, OPEN_PATHS, role_check
from loraplex_server.api.adapter_access import AdapterAccess
from loraplex_server.api.adapter_names import AdapterNames
from loraplex_server.api.adapters import adapters_router
from loraplex_server.api.audit import audit_router
from loraplex_server.api.chat import chat_router
from loraplex_server.api.completions import completions_router
from loraplex_server.api.dialogues import Dialogues
from loraplex_server.api.drain import Drain, DrainGate
from loraplex_server.api.embeddings import embeddings_router
from loraplex_server.api.envelope import Envelope
from loraplex_server.api.error_table import install_error_handlers
from loraplex_server.api.foreign_adapters import ForeignAdapters
from loraplex_server.api.front import Front, unix_time
from loraplex_server.api.generations import Generations, Promises
from loraplex_server.api.guard import Guard
from loraplex_server.api.job_maker import JobMaker
from loraplex_server.api.keys import keys_router
from loraplex_server.api.lorax_generate import lorax_router
from loraplex_server.api.messages import messages_router
from loraplex_server.api.model_names import ModelNames
from loraplex_server.api.models import models_router
from loraplex_server.api.observation import Observation
from loraplex_server.api.openapi import install_openapi
from loraplex_server.api.ops import ops_router
from loraplex_server.api.registry_follower import RegistryFollower
from loraplex_server.api.removals import AdapterRemovals
from loraplex_server.api.request_metrics import RequestMetrics
from loraplex_server.api.responses import responses_router
from loraplex_server.api.services import Services
from loraplex_server.api.sglang_adapters import sglang_adapters_router
from loraplex_server.api.tenant_accounts import TenantAccounts
from loraplex_server.api.tenant_desk import TenantDesk
from loraplex_server.api.tokenize import tokenize_router
from loraplex_server.api.upkeep import Upkeep
from loraplex_server.api.uploads import AdapterUploads
from loraplex_server.api.usage_report import usage_router
from loraplex_server.api.vllm_adapters import vllm_adapters_router
from loraplex_server.sizing import choose_device, choose_step_sizes

_DESCRIPTION: Final = "One language model and its LoRA adapters; `model` names the adapter."


def create_app(services: Services) -> FastAPI:
    """Return the application; its state lives in it and in `services`, nowhere else."""
    names = AdapterNames()
    observation, desk, drain = Observation(services, names), TenantDesk(services), Drain()
    app = _guarded_app(services, observation, desk, drain)
    generations = _generations(services, observation.requests, desk.accounts)
    removals = AdapterRemovals(services.engine, services.catalog, generations, names)
    upkeep = Upkeep(
        services.engine,
        services.catalog,
        removals,
        names,
        is_shared=services.config.registry_url is not None,
        chores=(desk.keys.write_uses, services.catalog.make_room),
    )
    follower = RegistryFollower(services.catalog.changes, removals, upkeep, names, desk.keys)
    ops = ops_router(
        engine=services.engine,
        adapter_names=names,
        generations=generations,
        drain=drain,
        registry=observation.registry,
        base_name=services.base_names[0],
    )
    for router in (
        *_generation_routers(services, generations, names, desk),
        *_adapter_routers(services, names, removals, upkeep, desk),
        ops,
        keys_router(desk),
        usage_router(desk, services.base_names),
        audit_router(services.catalog.database),
    ):
        app.include_router(router)
    # What the server starts and stops with itself.
    app.state.observation, app.state.drain = observation, drain
    app.state.upkeep, app.state.tenants = upkeep, desk
    app.state.follower = follower if services.config.registry_url is not None else None
    return app


@contextlib.asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[None]:
    """Do what the application needs beside its requests, and end it in order after the last."""
    tasks = [asyncio.create_task(app.state.upkeep.run())]
    if (follower := app.state.follower) is not None:
        tasks.append(asyncio.create_task(follower.run()))
    app.state.observation.start()
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await app.state.observation.stop()
        await app.state.tenants.close()


def _guarded_app(
    services: Services, observation: Observation, desk: TenantDesk, drain: Drain
) -> FastAPI:
    """Return an application without routes, in all that stands around them."""
    config = services.config
    open_paths = OPEN_PATHS | ({METRICS_PATH} if config.metrics_open else frozenset())
    app = FastAPI(
        title="loraplex",
        version=version("loraplex"),
        description=_DESCRIPTION,
        dependencies=[Depends(role_check(open_paths))],
    )
    app.add_middleware(DrainGate, drain=drain)
    app.add_middleware(
        Guard,
        keys=desk.keys,
        tenant_header=desk.header,
        open_paths=open_paths,
        limit_headers=desk.accounts.limit_headers if desk.accounts.has_limits else None,
        is_open=services.config.allow_open,
    )
    # Around the guard, whose refusals have an id too.
    app.add_middleware(Envelope, receive_timeout_s=config.receive_timeout_s)
    observation.install(app)
    install_error_handlers(app)
    install_openapi(app, open_paths)
    return app


def _generation_routers(
    services: Services, generations: Generations, names: AdapterNames, desk: TenantDesk
) -> Iterator[APIRouter]:
    config = services.config
    front = Front(
        engine=services.engine,
        vocabulary=services.vocabulary,
        generations=generations,
        jobs=JobMaker(services.engine, services.vocabulary),
        adapter_names=names,
        model_names=ModelNames(AdapterAccess(services.catalog), services.base_names),
        tenant_header=desk.header,
        isolates_prefixes=services.config.isolate_prefixes,
    )
    dialogues = Dialogues(front, config.tool_parser, config.trust_request_chat_template)
    yield completions_router(front)
    yield chat_router(dialogues)
    yield responses_router(dialogues)
    yield messages_router(dialogues)
    yield embeddings_router(front)
    yield tokenize_router(dialogues)
    yield lorax_router(dialogues, services.base_names[0])


def _adapter_routers(
    services: Services,
    names: AdapterNames,
    removals: AdapterRemovals,
    upkeep: Upkeep,
    desk: TenantDesk,
) -> Iterator[APIRouter]:
    engine, catalog, config = services.engine, services.catalog, services.config
    yield models_router(
        engine=engine,
        catalog=catalog,
        base_names=services.base_names,
        created=unix_time(),
        removals=removals,
    )
    uploads = AdapterUploads(
        engine,
        catalog,
        max_upload_bytes=config.max_upload_bytes,
        source_policy=SourcePolicy(config.adapter_root, config.allow_private_sources),
        owners=desk.owners,
    )
    foreign = ForeignAdapters(
        engine,
        catalog,
        uploads,
        removals,
        upkeep,
        root=config.adapter_root,
        pinned_share=config.pinned_share,
    )
    yield vllm_adapters_router(foreign)
    yield sglang_adapters_router(foreign)
    yield adapters_router(
        engine=engine,
        catalog=catalog,
        adapter_names=names,
        base_names=services.base_names,
        uploads=uploads,
        removals=removals,
        upkeep=upkeep,
        pinned_share=config.pinned_share,
    )


def _generations(
    services: Services, metrics: RequestMetrics, tenants: TenantAccounts
) -> Generations:
    config = services.config
    sizes = choose_step_sizes(config, choose_device(config.device))
    return Generations(
        engine=services.engine,
        vocabulary=services.vocabulary,
        metrics=metrics,
        max_sequences=sizes.max_running + config.max_queued,
        promises=Promises(config.request_timeout_s, config.ttft_slo_s),
        tenants=tenants,
        clock=services.clock,
    )
