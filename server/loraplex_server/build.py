"""Building the engine from a `Config`: the one place where its parts are put together."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from loraplex_kernels.native import load_native
from loraplex_memory.accounts import PoolAccounts
from loraplex_memory.host_arena import HostArena
from loraplex_memory.layout import PoolLayout
from loraplex_memory.pool import PagePool
from loraplex_memory.transfers import PoolWriter
from loraplex_scheduler.limits import SchedulerLimits
from loraplex_scheduler.policies import PolicyChoice, make_eviction, make_policies
from loraplex_scheduler.scheduler import Scheduler
from loraplex_server.config import Config
from loraplex_server.engine.constraints import Constraints
from loraplex_server.engine.core import EngineCore
from loraplex_server.engine.grammar_compiler import GrammarCompiler
from loraplex_server.engine.loader import AdapterLoader
from loraplex_server.engine.messages import EngineInfo
from loraplex_server.engine.process_handle import ProcessEngine
from loraplex_server.engine.runner import Runner, StepRunner
from loraplex_server.logs import set_up_logging
from loraplex_server.machine import num_processors
from loraplex_server.model.loader import load_weights
from loraplex_server.model.source import ModelSource, resolve_model
from loraplex_server.model.spec import ModelSpec
from loraplex_server.model.transformer import Transformer
from loraplex_server.model.weights import ModelWeights
from loraplex_server.sizing import (
    StepSizes,
    auto_pool_bytes,
    choose_device,
    choose_dtype,
    choose_host_pages,
    choose_limits,
    choose_num_pages,
    choose_page_tokens,
    choose_quantization,
    choose_step_sizes,
)

log = logging.getLogger(__name__)


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
    page_tokens = choose_page_tokens(config.page_tokens, spec.geometry)
    return ModelFacts(source, spec, PoolLayout(spec.geometry, page_tokens))


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
    device = choose_device(config.device)
    sizes = choose_step_sizes(config, device)
    torch.set_num_threads(config.threads or num_processors())
    facts = resolve_facts(config)
    dtype = choose_dtype(config.dtype, device)
    if device.type == "cpu":
        load_native()  # compiles for seconds on a new machine: the first request would wait
    quantization = choose_quantization(config.quantization, device)
    # Before the pool is sized: it takes a share of the memory that the weights leave.
    weights = load_weights(
        facts.source, facts.spec, dtype=dtype, device=device, quantization=quantization
    )
    pool_bytes = config.pool_bytes or auto_pool_bytes(device, _step_bytes(facts, weights, sizes))
    num_pages = choose_num_pages(pool_bytes, facts.layout, dtype.itemsize)
    limits = choose_limits(config, facts.spec, facts.layout, num_pages, sizes)
    warn_of_long_rope(facts.spec, limits.max_model_len)
    model = Transformer(facts.spec, weights, max_model_len=limits.max_model_len)
    log.info("%s is computed in %s", facts.base_name, model.precision)
    pool = PagePool(facts.layout, num_pages, dtype=dtype, device=device)
    num_host_pages = choose_host_pages(config.host_bytes, facts.layout, dtype.itemsize, device)
    arena = HostArena(facts.layout, num_host_pages, dtype=dtype, is_pinned=device.type == "cuda")
    assemble = _assemble_on_gpu if device.type == "cuda" else assemble_core
    spec = facts.spec
    constraints = Constraints(GrammarCompiler(spec.vocab_size, spec.eos_token_ids, wake))
    return assemble(
        model,
        pool,
        limits,
        wake,
        choice=choose_policies(config),
        arena=arena,
        constraints=constraints,
    )


def _step_bytes(facts: ModelFacts, weights: ModelWeights, sizes: StepSizes) -> int:
    """Return what a step needs of a GPU's memory beside weights and pool."""
    if weights.device.type == "cpu":
        return 0
    from loraplex_server.engine.gpu_engine import measure_step_bytes

    return measure_step_bytes(
        Transformer(facts.spec, weights),
        facts.layout,
        max_step_tokens=sizes.max_step_tokens,
        max_running=sizes.max_running,
    )


def choose_policies(config: Config) -> PolicyChoice:
    """Return what the settings say of scheduling and eviction."""
    return PolicyChoice(
        order=config.order,
        admission=config.admission,
        eviction=config.eviction,
        has_prefix_cache=config.prefix_cache,
        cluster_wait_s=config.cluster_wait_s,
        tenant_weights=config.tenant_weights,
    )


def _assemble_on_gpu(
    model: Transformer,
    pool: PagePool,
    limits: SchedulerLimits,
    wake: Callable[[], None],
    *,
    choice: PolicyChoice,
    arena: HostArena,
    constraints: Constraints,
) -> EngineCore:
    """Put an engine on a GPU together; compiles kernels and records graphs, which takes a while."""
    # Imported here: these import triton, which a CPU's engine does without.
    from loraplex_server.engine.gpu_engine import make_device_runner, make_stream_writer, warm_up

    writer = make_stream_writer(pool)  # first: a copy beside a recording would break it
    runner = make_device_runner(
        model,
        pool,
        max_step_tokens=limits.max_step_tokens,
        max_running=limits.max_running,
        grammars=constraints,
    )
    warm_up(
        runner,
        pool.layout,
        max_step_tokens=limits.max_step_tokens,
        max_running=limits.max_running,
        max_model_len=limits.max_model_len,
    )
    return assemble_core(
        model,
        pool,
        limits,
        wake,
        choice=choice,
        arena=arena,
        runner=runner,
        writer=writer,
        overlap=True,
        constraints=constraints,
    )


def assemble_core(
    model: Transformer,
    pool: PagePool,
    limits: SchedulerLimits,
    wake: Callable[[], None] = lambda: None,
    *,
    choice: PolicyChoice | None = None,
    arena: HostArena | None = None,
    runner: StepRunner | None = None,
    writer: PoolWriter | None = None,
    overlap: bool = False,
    constraints: Constraints | None = None,
) -> EngineCore:
    """Put scheduler, memory and a loaded model together.

    Args:
        choice: the policies; default: those of a server without settings.
        arena: host memory for packed adapters; default: none, each load reads the disk.
        runner: default: the one of a CPU.
        writer: how adapters get into the pool; default: by copying in host memory.
        overlap, constraints: see `EngineCore`.
    """
    layout = pool.layout
    choice = choice or PolicyChoice()
    policies = make_policies(choice, limits, layout.page_tokens)
    accounts = PoolAccounts(
        layout,
        pool.num_pages,
        eviction=make_eviction(choice),
        costs=policies.times,
        has_prefix_cache=choice.has_prefix_cache,
    )
    info = EngineInfo(
        max_model_len=limits.max_model_len,
        num_pages=pool.num_pages,
        page_tokens=layout.page_tokens,
        page_bytes=pool.page_bytes,
        num_layers=layout.geometry.num_layers,
        dtype=model.precision,
        device=str(pool.device),
    )
    native = load_native()
    pack = native.pack if native is not None else None
    return EngineCore(
        info=info,
        scheduler=Scheduler(limits, accounts, policies),
        runner=runner or Runner(model, pool, constraints),
        loader=AdapterLoader(pool, wake, writer, arena, pack=pack),
        accounts=accounts,
        overlap=overlap,
        constraints=constraints,
    )


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
