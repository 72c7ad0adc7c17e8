"""One engine per model shape, for the decode steps and the closed loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from bench_gpu_models import CONFIGS, random_model

from loraplex_memory.layout import PoolLayout
from loraplex_memory.pool import PagePool
from loraplex_scheduler.limits import SchedulerLimits
from loraplex_server.build import assemble_core
from loraplex_server.engine.core import EngineCore
from loraplex_server.engine.gpu_engine import make_device_runner, make_stream_writer
from loraplex_server.engine.runner import StepRunner
from loraplex_server.model.transformer import Transformer

#: Left beside weights and pool for activations, graphs and libraries' workspaces.
_SPARE_BYTES = 10 << 30


@dataclass(frozen=True)
class Engine:
    """A model, its pool and the core that owns them."""

    name: str
    model: Transformer
    pool: PagePool
    runner: StepRunner
    core: EngineCore


def make_engine(name: str, device: torch.device, dtype: torch.dtype) -> Engine:
    """Build an engine whose pool takes the memory that the weights leave."""
    is_cuda = device.type == "cuda"
    max_model_len = min(4096, int(str(CONFIGS[name]["max_position_embeddings"])))
    model = random_model(name, device, dtype, max_model_len=max_model_len)
    layout = PoolLayout(model.spec.geometry)
    if is_cuda:
        free, _ = torch.cuda.mem_get_info(device)
        num_pages = (free - _SPARE_BYTES) // layout.page_bytes(dtype.itemsize)
    else:
        num_pages = 600
    pool = PagePool(layout, num_pages, dtype=dtype, device=device)
    limits = SchedulerLimits(
        max_step_tokens=2048 if is_cuda else 64,
        max_running=256 if is_cuda else 8,
        max_model_len=max_model_len,
        max_loading=16,
    )
    writer = make_stream_writer(pool) if is_cuda else None
    runner = make_device_runner(
        model, pool, max_step_tokens=limits.max_step_tokens, max_running=limits.max_running
    )
    core = assemble_core(model, pool, limits, runner=runner, writer=writer, overlap=True)
    return Engine(name, model, pool, runner, core)
