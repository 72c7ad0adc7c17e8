"""Building the engine from a `Config`: the one place where its parts are put together."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from loraplex_kernels.native import load_native
from loraplex_memory.allocator import PageAllocator
from loraplex_memory.layout import PoolLayout
from loraplex_memory.pool import PagePool
from loraplex_memory.residency import AdapterResidency
from loraplex_scheduler.limits import SchedulerLimits
from loraplex_scheduler.scheduler import Scheduler
from loraplex_server.config import Config
from loraplex_server.engine.core import EngineCore
from loraplex_server.engine.errors import EngineConfigError
from loraplex_server.engine.loader import AdapterLoader
from loraplex_server.engine.messages import EngineInfo
from loraplex_server.engine.process_handle import ProcessEngine
from loraplex_server.engine.runner import Runner
from loraplex_server.logs import set_up_logging
from loraplex_server.machine import available_bytes, num_processors
from loraplex_server.model.loader import load_weights
from loraplex_server.model.source import ModelSource, resolve_model
from loraplex_server.model.spec import ModelSpec
from loraplex_server.model.transformer import Transformer

log = logging.getLogger(__name__)

#: `auto` takes this share of the memory that is free once the model is loaded, and no more than
#: the cap: pages of a CPU pool are committed when they are first written.
_POOL_SHARE = 0.25
_POOL_CAP_BYTES = 4 << 30


@dataclass(frozen=True)
class ModelFacts:
    """What the API process and the engine process must agree on; needs no weights."""

    source: ModelSource
    spec: ModelSpec
    layout: PoolLayout

    @property
    def base_name(self) -> str:
        return self.spec.base_name


def resolve_facts(config: Config) -> ModelFacts:
    """Find the model's files and derive what follows from its config.

    Raises:
        ModelError: the model is not there, or is of a kind that is not supported.
    """
    source = resolve_model(config.model)
    spec = ModelSpec.from_config(
        source.load_config(),
        base_name=config.served_model_name or source.name,
        eos_token_ids=source.generation_eos_ids(),
    )
    return ModelFacts(source, spec, PoolLayout(spec.geometry, config.page_tokens))


def build_engine_handle(config: Config) -> ProcessEngine:
    """Return the engine in a process of its own, not started yet."""
    return ProcessEngine(functools.partial(_build_in_process, config))


def _build_in_process(config: Config, wake: Callable[[], None]) -> EngineCore:
    """The engine process knows nothing of settings: what it needs of them is set up here."""
    set_up_logging(config.log_level)
    return build_core(config, wake)


def build_core(config: Config, wake: Callable[[], None] = lambda: None) -> EngineCore:
    """Load the model and return the engine as a plain object.

    Args:
        config: the settings.
        wake: called by the loader's thread after each load.

    Raises:
        ModelError: the model cannot be served.
        EngineConfigError: the settings do not fit the model or the machine.
    """
    check_step(config)
    torch.set_num_threads(config.threads or num_processors())
    facts = resolve_facts(config)
    dtype = choose_dtype(config.dtype)
    load_native()  # compiles for seconds on a new machine, which the first request would wait for
    # Before the pool is sized: it takes a share of the memory that the weights leave.
    weights = load_weights(facts.source, facts.spec, dtype=dtype)
    limits = choose_limits(config, facts, dtype)
    max_model_len = limits.scheduler.max_model_len
    warn_of_long_rope(facts.spec, max_model_len)
    model = Transformer(facts.spec, weights, max_model_len=max_model_len)
    pool = PagePool(facts.layout, limits.num_pages, dtype=dtype)
    return assemble_core(model, pool, limits.scheduler, wake)


def assemble_core(
    model: Transformer,
    pool: PagePool,
    limits: SchedulerLimits,
    wake: Callable[[], None] = lambda: None,
) -> EngineCore:
    """Put scheduler, memory and a loaded model together."""
    layout = pool.layout
    allocator = PageAllocator(pool.num_pages)
    residency = AdapterResidency(allocator)
    info = EngineInfo(
        max_model_len=limits.max_model_len,
        num_pages=pool.num_pages,
        page_tokens=layout.page_tokens,
        page_bytes=pool.page_bytes,
        num_layers=layout.geometry.num_layers,
        dtype=str(pool.dtype).removeprefix("torch."),
        device=str(pool.device),
    )
    return EngineCore(
        info=info,
        scheduler=Scheduler(limits, layout, allocator, residency),
        runner=Runner(model, pool),
        loader=AdapterLoader(pool, wake),
        allocator=allocator,
        residency=residency,
    )


@dataclass(frozen=True)
class EngineLimits:
    """Sizes that follow from settings, model and machine together."""

    num_pages: int
    scheduler: SchedulerLimits


def warn_of_long_rope(spec: ModelSpec, max_model_len: int) -> None:
    """Say that a longrope model computes short texts otherwise than transformers does.

    transformers changes the frequencies with the longest text of a batch; ours may not depend on
    company, so one regime holds for the engine's life.
    """
    original = spec.rope.original_max_positions
    if original is not None and max_model_len > original:
        log.warning(
            "%s uses its long-context frequencies for every text, as max_model_len is %d; adapters "
            "trained on short texts want --max-model-len %d",
            spec.base_name,
            max_model_len,
            original,
        )


def check_step(config: Config) -> None:
    """Raise EngineConfigError unless a step has room for a token of every running sequence."""
    if config.max_step_tokens < config.max_running:
        raise EngineConfigError(
            f"max_step_tokens is {config.max_step_tokens} and max_running {config.max_running}: "
            "a step must have room for one token of every running sequence; "
            "raise max_step_tokens or lower max_running"
        )


def choose_limits(config: Config, facts: ModelFacts, dtype: torch.dtype) -> EngineLimits:
    """Settle the sizes left to `auto` and check the others.

    Raises:
        EngineConfigError: the settings do not fit the model or the machine.
    """
    num_pages = choose_num_pages(config.pool_bytes, facts.layout, dtype.itemsize)
    limits = SchedulerLimits(
        max_step_tokens=config.max_step_tokens,
        max_running=config.max_running,
        max_model_len=choose_max_model_len(config, facts.spec, num_pages),
        eos_token_ids=facts.spec.eos_token_ids,
    )
    return EngineLimits(num_pages, limits)


def choose_dtype(name: str) -> torch.dtype:
    """Return the dtype of weights, KV cache and adapters.

    `auto` is bfloat16 where the processor multiplies it natively (measured three times as fast as
    float32 there) and float32 elsewhere.
    """
    if name == "auto":
        name = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def choose_num_pages(pool_bytes: int | None, layout: PoolLayout, elem_bytes: int) -> int:
    """Return how many pages fit into the pool's bytes.

    Raises:
        EngineConfigError: not even one.
    """
    if pool_bytes is None:
        pool_bytes = min(_POOL_CAP_BYTES, int(_POOL_SHARE * available_bytes()))
    num_pages = pool_bytes // layout.page_bytes(elem_bytes)
    if num_pages < 1:
        raise EngineConfigError(
            f"pool_bytes is {pool_bytes} and one page of this model takes "
            f"{layout.page_bytes(elem_bytes)}: give the pool more memory"
        )
    return num_pages


def choose_max_model_len(config: Config, spec: ModelSpec, num_pages: int) -> int:
    """Return the longest sequence: the model's limit, unless the pool or a setting is smaller.

    Raises:
        EngineConfigError: a length was asked for that the model or the pool does not have.
    """
    in_pool = num_pages * config.page_tokens
    most = min(spec.max_position_embeddings, in_pool)
    if config.max_model_len is None:
        return most
    if config.max_model_len > most:
        raise EngineConfigError(
            f"max_model_len is {config.max_model_len}; the model allows "
            f"{spec.max_position_embeddings} tokens and the pool holds {in_pool}"
        )
    return config.max_model_len
