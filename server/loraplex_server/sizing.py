"""What settings, model and machine decide together: device, number formats, sizes, policies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch

from loraplex_kernels.native import load_native
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_memory.layout import PROJECTIONS, ModelGeometry, PoolLayout, Projection
from loraplex_scheduler.limits import SchedulerLimits
from loraplex_scheduler.policies import PolicyChoice
from loraplex_server.config import Config
from loraplex_server.engine.errors import EngineConfigError
from loraplex_server.machine import available_bytes, num_processors
from loraplex_server.model.linear import Quantization
from loraplex_server.model.spec import ModelSpec

#: On a CPU `auto` takes this share of the memory that is free once the model is loaded, and no
#: more than the cap: pages are committed when they are first written.
_CPU_POOL_SHARE: Final = 0.25
_CPU_POOL_CAP_BYTES: Final = 4 << 30

#: On a GPU nobody else needs the memory; the rest is for fragments and the driver.
_GPU_POOL_SHARE: Final = 0.92

#: The share of the memory that is free, once the pool is there, for adapters packed in host memory.
#: Pinned memory is taken at once; a CPU's is committed when it is first written, and competes with
#: the disk's cache for what the adapter files are read from.
_HOST_SHARE: Final = {"cpu": 0.1, "cuda": 0.25}
_CPU_HOST_CAP_BYTES: Final = 2 << 30

#: Tokens of a page, the best first: a page's id and its place in a block table are shared by more.
_PAGE_TOKENS: Final = (16, 8, 4)

#: Adapters that a page is chosen for: these ranks on every linear, and on those of attention.
_USUAL_RANKS: Final = (8, 16, 32, 64)
_USUAL_TARGETS: Final[tuple[tuple[Projection, ...], ...]] = (PROJECTIONS, ("q", "k", "v", "o"))

#: The share of their pages that such adapters may leave empty, all ranks together.
_MAX_WASTE: Final = 0.02

#: Compute capability of Ampere: asynchronous copies, and bfloat16 in the tensor cores.
_OLDEST_GPU: Final = (8, 0)

#: Tokens and sequences of a step: a GPU needs more of them to be busy.
_STEP_SIZES: Final = {"cpu": (512, 64), "cuda": (2048, 256)}


def choose_device(name: str, rank: int = 0) -> torch.device:
    """Return where to compute; `auto` is the GPU where there is one that can.

    Args:
        rank: of several that compute a model together: each has a GPU of its own.

    Raises:
        EngineConfigError: a GPU was asked for, and torch sees none or one that is too old.
    """
    has_gpu = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability(rank) if has_gpu else (0, 0)
    if name == "cuda" and not has_gpu:
        raise EngineConfigError(
            "device is cuda and torch sees no GPU: check `nvidia-smi`, install the CUDA build of "
            "torch, or serve with --device cpu"
        )
    is_new = capability >= _OLDEST_GPU
    if name == "cuda" and not is_new:
        raise EngineConfigError(
            "device is cuda and the GPU has compute capability {}.{}; the kernels need {}.{}: "
            "serve with --device cpu".format(*capability, *_OLDEST_GPU)
        )
    if name == "auto":
        name = "cuda" if is_new else "cpu"
    return torch.device(name, rank) if name == "cuda" else torch.device(name)


def check_num_ranks(config: Config, device: torch.device, geometry: ModelGeometry) -> None:
    """Check that so many ranks can compute the model together.

    Raises:
        EngineConfigError: there are fewer GPUs, the model has fewer heads, or the weights are of
            a form that cannot be cut.
    """
    num_ranks = config.tensor_parallel
    if num_ranks > geometry.num_heads:
        raise EngineConfigError(
            f"tensor_parallel is {num_ranks} and the model has {geometry.num_heads} attention "
            f"heads, of which each rank needs one: serve with --tensor-parallel "
            f"{geometry.num_heads} or less"
        )
    if num_ranks > 1 and config.quantization != "none":
        raise EngineConfigError(
            f"quantization is {config.quantization} and tensor_parallel {num_ranks}: only one rank "
            "alone reads such weights; serve with --quantization none or --tensor-parallel 1"
        )
    num_gpus = torch.cuda.device_count()
    if device.type == "cuda" and num_ranks > num_gpus:
        raise EngineConfigError(
            f"tensor_parallel is {num_ranks} and torch sees {num_gpus} GPUs, of which each rank "
            f"needs one: serve with --tensor-parallel {num_gpus} or less, or see why "
            "`nvidia-smi -L` or CUDA_VISIBLE_DEVICES has so few"
        )


def choose_num_threads(config: Config) -> int:
    """Return the threads of one rank: an equal share of those of the replica."""
    return max(1, (config.threads or num_processors()) // config.tensor_parallel)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of weights, KV cache and adapters.

    `auto` is bfloat16 where the hardware multiplies it natively (measured three times as fast as
    float32 on such a CPU) and float32 elsewhere.
    """
    if name == "auto":
        has_bfloat16 = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        name = "bfloat16" if has_bfloat16 else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def choose_quantization(name: str, device: torch.device) -> Quantization:
    """Return how weights are rounded besides to the dtype: as asked, never by itself.

    Raises:
        EngineConfigError: nothing here can multiply them.
    """
    if name == "none":
        return "none"
    if device.type != "cpu":
        raise EngineConfigError(
            "quantization is int8 and the device a GPU, whose kernels read bfloat16 or float32 "
            "weights only: serve with --quantization none or --device cpu"
        )
    if load_native() is None:
        raise EngineConfigError(
            "quantization is int8 and the compiled kernels are not there, which alone read such "
            "weights: install a C compiler (see the log above), or serve with --quantization none"
        )
    return "int8"


@dataclass(frozen=True)
class StepSizes:
    """Most tokens and most sequences of one step."""

    max_step_tokens: int
    max_running: int


def choose_step_sizes(config: Config, device: torch.device) -> StepSizes:
    """Settle the sizes of a step.

    Raises:
        EngineConfigError: a step has no room for a token of every running sequence.
    """
    max_step_tokens, max_running = _STEP_SIZES[device.type]
    max_running = config.max_running or min(max_running, config.max_step_tokens or max_running)
    max_step_tokens = config.max_step_tokens or max(max_step_tokens, max_running)
    if max_step_tokens < max_running:
        raise EngineConfigError(
            f"max_step_tokens is {max_step_tokens} and max_running {max_running}: "
            "a step must have room for one token of every running sequence; "
            "raise max_step_tokens or lower max_running"
        )
    return StepSizes(max_step_tokens, max_running)


def auto_pool_bytes(device: torch.device, step_bytes: int = 0, num_ranks: int = 1) -> int:
    """Return the size of a pool that was not set, the parts of all ranks together.

    Args:
        step_bytes: on a GPU, what the largest step needs besides weights and pool.
        num_ranks: that share a CPU's memory, or have a GPU like this each.
    """
    if device.type == "cpu":
        return min(_CPU_POOL_CAP_BYTES, int(_CPU_POOL_SHARE * available_bytes()))
    free, _ = torch.cuda.mem_get_info(device)
    return num_ranks * max(0, int(_GPU_POOL_SHARE * free) - step_bytes)


def choose_page_tokens(page_tokens: int | None, geometry: ModelGeometry, num_ranks: int = 1) -> int:
    """Return how many tokens fill a page: as set, or the most at which adapters waste little.

    An adapter leaves half a page empty on average, which matters where few tokens make a large one:
    with multi-head attention.
    """
    if page_tokens is not None:
        return page_tokens
    layouts = (PoolLayout(geometry, n, num_ranks) for n in _PAGE_TOKENS)
    few = (layout.page_tokens for layout in layouts if _adapter_waste(layout) <= _MAX_WASTE)
    return next(few, _PAGE_TOKENS[-1])


def _adapter_waste(layout: PoolLayout) -> float:
    """Return the share of the pages of usual adapters without weights, for the worse targets."""
    # All layers are alike, so one tells.
    one_layer = replace(layout, geometry=replace(layout.geometry, num_layers=1))
    shares = []
    for targets in _USUAL_TARGETS:
        rows = [tuple(rank * (p in targets) for p in PROJECTIONS) for rank in _USUAL_RANKS]
        adapters = [AdapterLayout(one_layer, AdapterSpec((row,))) for row in rows]
        num_held = sum(adapter.num_pages for adapter in adapters) * layout.page_elems
        shares.append(1.0 - sum(adapter.num_elems for adapter in adapters) / num_held)
    return max(shares)


def replica_page_bytes(layout: PoolLayout, elem_bytes: int) -> int:
    """Return what one page takes on all ranks together."""
    return layout.num_ranks * layout.page_bytes(elem_bytes)


def choose_num_pages(pool_bytes: int, layout: PoolLayout, elem_bytes: int) -> int:
    """Return how many pages fit into the pool's bytes.

    Args:
        pool_bytes: of all ranks together.

    Raises:
        EngineConfigError: not even one.
    """
    page_bytes = replica_page_bytes(layout, elem_bytes)
    num_pages = pool_bytes // page_bytes
    if num_pages < 1:
        raise EngineConfigError(
            f"pool_bytes is {pool_bytes} and one page of this model takes "
            f"{page_bytes}: give the pool more memory"
        )
    return num_pages


def choose_host_pages(
    host_bytes: int | None, layout: PoolLayout, elem_bytes: int, device: torch.device
) -> int:
    """Return how many pages of packed adapters host memory holds.

    Args:
        host_bytes: as set, of all ranks together: 0 for none, and None to take a share of the
            memory that is free now.
    """
    if host_bytes is None:
        host_bytes = int(_HOST_SHARE[device.type] * available_bytes())
        if device.type == "cpu":
            host_bytes = min(host_bytes, _CPU_HOST_CAP_BYTES)
    return host_bytes // replica_page_bytes(layout, elem_bytes)


def choose_limits(
    config: Config, spec: ModelSpec, layout: PoolLayout, num_pages: int, sizes: StepSizes
) -> SchedulerLimits:
    """Return the scheduler's limits.

    Raises:
        EngineConfigError: a length was asked for that the model or the pool does not have.
    """
    return SchedulerLimits(
        max_step_tokens=sizes.max_step_tokens,
        max_running=sizes.max_running,
        max_model_len=_choose_max_model_len(config, spec, num_pages * layout.page_tokens),
        eos_token_ids=spec.eos_token_ids,
    )


def _choose_max_model_len(config: Config, spec: ModelSpec, in_pool: int) -> int:
    """Return the longest sequence: the model's limit, unless a setting is smaller, or the pool.

    Args:
        in_pool: tokens that the pool holds.
    """
    most = min(spec.max_position_embeddings, in_pool)
    if config.max_model_len is None:
        return most
    if config.max_model_len > most:
        raise EngineConfigError(
            f"max_model_len is {config.max_model_len}; the model allows "
            f"{spec.max_position_embeddings} tokens and the pool holds {in_pool}"
        )
    return config.max_model_len


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
