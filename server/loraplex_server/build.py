"""Building the engine from a `Config`: the one place where its parts are put together."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from loraplex_kernels.collectives import Collectives
from loraplex_kernels.native import load_native
from loraplex_memory.accounts import PoolAccounts
from loraplex_memory.file_packer import CompiledPack
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
from loraplex_server.engine.loader import AdapterLoader, LoadPeers
from loraplex_server.engine.messages import EngineInfo
from loraplex_server.engine.process_handle import ProcessEngine
from loraplex_server.engine.ranks.lead_loads import LeadLoads
from loraplex_server.engine.ranks.lead_runner import LeadRunner
from loraplex_server.engine.ranks.seat import RANK_TIMEOUT_S, Alone, Seat
from loraplex_server.engine.ranks.worker import RankParts
from loraplex_server.engine.ranks.workers import RankWorkers
from loraplex_server.engine.runner import Runner, StepRunner
from loraplex_server.engine.step_meter import StepParts
from loraplex_server.logs import set_up_logging
from loraplex_server.model.loader import load_weights
from loraplex_server.model.model_shard import ModelShard
from loraplex_server.model.source import ModelSource, resolve_model
from loraplex_server.model.spec import ModelSpec
from loraplex_server.model.transformer import Transformer
from loraplex_server.model.weights import ModelWeights
from loraplex_server.sizing import (
    StepSizes,
    auto_pool_bytes,
    check_num_ranks,
    choose_device,
    choose_dtype,
    choose_host_pages,
    choose_limits,
    choose_num_pages,
    choose_num_threads,
    choose_page_tokens,
    choose_policies,
    choose_quantization,
    choose_step_sizes,
)

log = logging.getLogger(__name__)

#: How the engine process ends when another rank is lost; the log has said why.
RANK_LOST_EXIT_CODE: Final = 70


@dataclass(frozen=True)
class ModelFacts:
    """What the API process and the engine's processes must agree on; needs no weights.

    Found once, in the first process: reading a config takes transformers, whose import costs each
    process seconds and 200 MB.
    """

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
    num_ranks = config.tensor_parallel
    page_tokens = choose_page_tokens(config.page_tokens, spec.geometry, num_ranks)
    return ModelFacts(source, spec, PoolLayout(spec.geometry, page_tokens, num_ranks))


def build_engine_handle(config: Config, facts: ModelFacts) -> ProcessEngine:
    """Return the engine in a process of its own, not started yet."""
    return ProcessEngine(functools.partial(build_in_process, config, facts))


def build_in_process(
    config: Config,
    facts: ModelFacts,
    wake: Callable[[], None],
    *,
    rank_timeout_s: float = RANK_TIMEOUT_S,
) -> EngineCore:
    """Build the core inside the engine process.

    That one knows nothing of settings: what it needs of them is set up here. It ends when another
    rank is lost, wherever it is then; whoever started it starts it again.
    """
    set_up_logging(config.log_level, config.log_format)
    end = functools.partial(os._exit, RANK_LOST_EXIT_CODE)
    return build_core(config, facts, wake, on_lost=end, rank_timeout_s=rank_timeout_s)


def build_core(
    config: Config,
    facts: ModelFacts,
    wake: Callable[[], None] = lambda: None,
    *,
    on_lost: Callable[[], None] = lambda: None,
    rank_timeout_s: float = RANK_TIMEOUT_S,
) -> EngineCore:
    """Load the model and return the engine as a plain object.

    Args:
        config: the settings.
        facts: of the model that they name.
        wake: called by the loader's thread after each load.
        on_lost: see `RankWorkers`; as a step may then never return, a process of its own should
            end. Default: the step raises RankLost, if it returns.
        rank_timeout_s: see `RankWorkers`.

    Raises:
        ModelError: the model cannot be served.
        EngineConfigError: the settings do not fit the model or the machine.
    """
    sizes = _check(config, facts)  # before other ranks start, each of which would say the same
    if config.tensor_parallel == 1:
        return _assemble(config, _build_part(config, Alone(), facts, sizes), wake)
    build = functools.partial(build_rank, config, facts)
    workers = RankWorkers(config.tensor_parallel, build, on_lost=on_lost, timeout_s=rank_timeout_s)
    with workers.starting():
        return _assemble(config, _build_part(config, workers, facts, sizes), wake, workers)


def build_rank(
    config: Config, facts: ModelFacts, seat: Seat, on_loaded: Callable[[], None]
) -> RankParts:
    """Build a rank other than 0, inside its process; raises as `build_core` does."""
    set_up_logging(config.log_level, config.log_format, seat.rank)
    part = _build_part(config, seat, facts, _check(config, facts))
    runner, writer = _make_runner(part)
    loader = AdapterLoader(
        part.pool, on_loaded, writer, part.arena, pack=_compiled_pack(), rank=seat.rank
    )
    return RankParts(part.pool.layout, runner, loader)


@dataclass(frozen=True)
class _Part:
    """What one rank has of an engine: of the only one, everything."""

    model: Transformer
    pool: PagePool
    arena: HostArena
    limits: SchedulerLimits


def _check(config: Config, facts: ModelFacts) -> StepSizes:
    """Return what follows from the settings without weights; raises as `build_core` does."""
    device = choose_device(config.device)
    sizes = choose_step_sizes(config, device)
    check_num_ranks(config, device, facts.spec.geometry)
    return sizes


def _build_part(config: Config, seat: Seat, facts: ModelFacts, sizes: StepSizes) -> _Part:
    """Load a rank's part of the model, and find room for its part of the pages."""
    device = choose_device(config.device, seat.rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(choose_num_threads(config))
    dtype = choose_dtype(config.dtype, device)
    if device.type == "cpu":
        load_native()  # compiles for seconds on a new machine: the first request would wait
    # Before the pool is sized: it takes a share of the memory that the weights leave.
    weights = load_weights(
        facts.source,
        facts.spec,
        dtype=dtype,
        device=device,
        quantization=choose_quantization(config.quantization, device),
        shard=_shard(facts, seat),
    )
    group = seat.join(device)
    step_bytes = _step_bytes(facts, weights, sizes, group)
    layout = facts.layout
    pool_bytes = config.pool_bytes or auto_pool_bytes(device, step_bytes, seat.num_ranks)
    num_pages, num_host_pages = seat.agree(
        choose_num_pages(pool_bytes, layout, dtype.itemsize),
        choose_host_pages(config.host_bytes, layout, dtype.itemsize, device),
    )
    limits = choose_limits(config, facts.spec, layout, num_pages, sizes)
    model = Transformer(facts.spec, weights, max_model_len=limits.max_model_len, group=group)
    if seat.rank == 0:
        warn_of_long_rope(facts.spec, limits.max_model_len)
        log.info("%s is computed in %s", facts.base_name, model.precision)
    if seat.rank == 0 and group is not None:
        padded = 100 * layout.partition.padded_share
        log.info(
            "it is cut over %d ranks, whose work is padding by %.1f %%", group.num_ranks, padded
        )
    pool = PagePool(layout, num_pages, dtype=dtype, device=device)
    arena = HostArena(layout, num_host_pages, dtype=dtype, is_pinned=device.type == "cuda")
    return _Part(model, pool, arena, limits)


def _shard(facts: ModelFacts, seat: Seat) -> ModelShard | None:
    if seat.num_ranks == 1:
        return None
    return ModelShard(facts.layout.partition, seat.rank)


def _compiled_pack() -> CompiledPack | None:
    native = load_native()
    return native.pack if native is not None else None


def _make_runner(
    part: _Part, constraints: Constraints | None = None, parts: StepParts | None = None
) -> tuple[StepRunner, PoolWriter | None]:
    """Return what computes a part's steps, and what loads adapters into its pool, if not a copy.

    On a GPU that compiles kernels and records graphs, which takes a while.
    """
    if part.pool.device.type == "cpu":
        return Runner(part.model, part.pool, constraints, parts), None
    # Imported here: these import triton, which a CPU's engine does without.
    from loraplex_server.engine.gpu_engine import make_device_runner, make_stream_writer

    writer = make_stream_writer(part.pool)  # first: a copy beside a recording would break it
    runner = make_device_runner(
        part.model,
        part.pool,
        max_step_tokens=part.limits.max_step_tokens,
        max_running=part.limits.max_running,
        grammars=constraints,
    )
    return runner, writer


def _assemble(
    config: Config, part: _Part, wake: Callable[[], None], workers: RankWorkers | None = None
) -> EngineCore:
    """Put an engine around rank 0's part, which is all of it where there are no others."""
    model, pool, limits = part.model, part.pool, part.limits
    constraints = Constraints(
        GrammarCompiler(model.spec.vocab_size, model.spec.eos_token_ids, wake)
    )
    parts = StepParts()
    runner, writer = _make_runner(part, constraints, parts)
    is_gpu = pool.device.type == "cuda"
    peers = None
    if workers is not None:
        workers.begin_serving()
        runner = LeadRunner(runner, workers)
        peers = LeadLoads(workers, wake)
    if is_gpu:
        from loraplex_server.engine.gpu_engine import warm_up

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
        choice=choose_policies(config),
        arena=part.arena,
        runner=runner,
        writer=writer,
        overlap=is_gpu,
        constraints=constraints,
        parts=parts,
        peers=peers,
        on_close=runner.close,
    )


def _step_bytes(
    facts: ModelFacts, weights: ModelWeights, sizes: StepSizes, group: Collectives | None
) -> int:
    """Return what a step needs of a GPU's memory beside weights and pool."""
    if weights.device.type == "cpu":
        return 0
    from loraplex_server.engine.gpu_engine import measure_step_bytes

    return measure_step_bytes(
        Transformer(facts.spec, weights, group=group),
        facts.layout,
        max_step_tokens=sizes.max_step_tokens,
        max_running=sizes.max_running,
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
    parts: StepParts | None = None,
    peers: LoadPeers | None = None,
    on_close: Callable[[], None] = lambda: None,
) -> EngineCore:
    """Put scheduler, memory and a loaded model together.

    Args:
        choice: the policies; default: those of a server without settings.
        arena: host memory for packed adapters; default: none, each load reads the disk.
        runner: default: the one of a CPU.
        writer: how adapters get into the pool; default: by copying in host memory.
        overlap, constraints, parts, on_close: see `EngineCore`.
        peers: see `AdapterLoader`.
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
        page_bytes=layout.num_ranks * pool.page_bytes,
        num_layers=layout.geometry.num_layers,
        dtype=model.precision,
        device=_device_name(pool),
    )
    parts = parts or StepParts()
    return EngineCore(
        info=info,
        scheduler=Scheduler(limits, accounts, policies),
        runner=runner or Runner(model, pool, constraints, parts),
        loader=AdapterLoader(pool, wake, writer, arena, pack=_compiled_pack(), peers=peers),
        accounts=accounts,
        overlap=overlap,
        constraints=constraints,
        parts=parts,
        on_close=on_close,
    )


def _device_name(pool: PagePool) -> str:
    """Return where the ranks of a pool compute, for people."""
    num_ranks = pool.layout.num_ranks
    return str(pool.device) if num_ranks == 1 else f"{num_ranks} x {pool.device.type}"


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
