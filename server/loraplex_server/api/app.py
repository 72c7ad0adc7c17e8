"""The HTTP application: every endpoint, built over one set of services."""

from __future__ import annotations

from importlib.metadata import version
from typing import Final

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from loraplex_server.adapters.sources.source import SourcePolicy
from loraplex_server.api.adapter_names import AdapterNames
from loraplex_server.api.adapters import adapters_router
from loraplex_server.api.chat import chat_router
from loraplex_server.api.completions import completions_router
from loraplex_server.api.drain import Drain, DrainGate
from loraplex_server.api.engine_metrics import EngineCollector
from loraplex_server.api.envelope import Envelope
from loraplex_server.api.error_table import install_error_handlers
from loraplex_server.api.foreign_adapters import ForeignAdapters
from loraplex_server.api.front import Front, unix_time
from loraplex_server.api.generations import Generations, Promises
from loraplex_server.api.guard import Guard
from loraplex_server.api.lorax_generate import lorax_router
from loraplex_server.api.model_names import ModelNames
from loraplex_server.api.models import models_router
from loraplex_server.api.ops import ops_router
from loraplex_server.api.removals import AdapterRemovals
from loraplex_server.api.request_metrics import RequestMetrics
from loraplex_server.api.services import Services
from loraplex_server.api.sglang_adapters import sglang_adapters_router
from loraplex_server.api.tenant_accounts import TenantAccounts
from loraplex_server.api.tenant_header import TenantHeader
from loraplex_server.api.upkeep import Upkeep
from loraplex_server.api.uploads import AdapterUploads
from loraplex_server.api.vllm_adapters import vllm_adapters_router
from loraplex_server.sizing import choose_device, choose_step_sizes

_DESCRIPTION: Final = "One language model and its LoRA adapters; `model` names the adapter."


def create_app(services: Services) -> FastAPI:
    """Return the application; its state lives in it and in `services`, nowhere else."""
    registry = CollectorRegistry()
    names = AdapterNames()
    base_name = services.base_names[0]
    registry.register(EngineCollector(services.engine, names, base_name))
    app = FastAPI(title="loraplex", version=version("loraplex"), description=_DESCRIPTION)
    drain = app.state.drain = Drain()
    app.add_middleware(DrainGate, drain=drain)
    app.add_middleware(Guard, api_key=services.config.api_key)
    app.add_middleware(Envelope)  # around the guard, whose refusals have an id too
    install_error_handlers(app)
    generations = _generations(services, RequestMetrics(registry))
    removals = AdapterRemovals(services.engine, services.catalog, generations, names)
    upkeep = app.state.upkeep = Upkeep(
        services.engine,
        services.catalog,
        removals,
        names,
        is_shared=services.config.registry_url is not None,
    )
    front = Front(
        engine=services.engine,
        vocabulary=services.vocabulary,
        generations=generations,
        adapter_names=names,
        model_names=ModelNames(services.catalog, services.base_names),
        tenant_header=TenantHeader(services.config.tenant_header),
    )
    app.include_router(completions_router(front))
    app.include_router(chat_router(front))
    app.include_router(lorax_router(front))
    app.include_router(
        models_router(
            engine=services.engine,
            catalog=services.catalog,
            base_names=services.base_names,
            created=unix_time(),
            removals=removals,
        )
    )
    uploads = _uploads(services)
    foreign = ForeignAdapters(
        services.engine,
        services.catalog,
        uploads,
        removals,
        upkeep,
        root=services.config.adapter_root,
        pinned_share=services.config.pinned_share,
    )
    app.include_router(vllm_adapters_router(foreign))
    app.include_router(sglang_adapters_router(foreign))
    app.include_router(
        adapters_router(
            engine=services.engine,
            catalog=services.catalog,
            adapter_names=names,
            base_names=services.base_names,
            uploads=uploads,
            removals=removals,
            upkeep=upkeep,
            pinned_share=services.config.pinned_share,
        )
    )
    app.include_router(
        ops_router(
            engine=services.engine,
            adapter_names=names,
            generations=generations,
            drain=drain,
            registry=registry,
            base_name=base_name,
        )
    )
    return app


def _uploads(services: Services) -> AdapterUploads:
    config = services.config
    return AdapterUploads(
        services.engine,
        services.catalog,
        max_upload_bytes=config.max_upload_bytes,
        source_policy=SourcePolicy(config.adapter_root, config.allow_private_sources),
    )


def _generations(services: Services, metrics: RequestMetrics) -> Generations:
    config = services.config
    sizes = choose_step_sizes(config, choose_device(config.device))
    return Generations(
        engine=services.engine,
        vocabulary=services.vocabulary,
        metrics=metrics,
        max_sequences=sizes.max_running + config.max_queued,
        promises=Promises(config.request_timeout_s, config.ttft_slo_s),
        tenants=_tenants(services),
        clock=services.clock,
    )


def _tenants(services: Services) -> TenantAccounts:
    config = services.config
    return TenantAccounts(
        max_queued=config.max_queued_per_tenant,
        tokens_per_minute=config.tenant_tokens_per_minute,
        clock=services.clock,
    )
