"""What an engine on a GPU is made of, its first step, and how much memory its largest takes."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Final

import torch

from loraplex_kernels.model_tables import StepCapacity
from loraplex_kernels.ops import device_backend
from loraplex_kernels.scatter_triton import scatter_pages
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_memory.layout import PROJECTIONS, PoolLayout
from loraplex_memory.pool import PagePool
from loraplex_memory.transfers import StreamWriter
from loraplex_scheduler.plan import Plan, PlannedAdapter, Request, SequenceStep
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.engine.device_runner import DeviceRunner
from loraplex_server.engine.runner import StepRunner
from loraplex_server.engine.step_graphs import CudaGraphRecorder, DirectRecorder, GraphRecorder
from loraplex_server.model.token_masks import GrammarMasks
from loraplex_server.model.transformer import Transformer, kernel_model

#: Page ids in all block tables of a step, as a multiple of the pool's pages. Sequences that share a
#: prefix name the same pages, so there may be more than one of each. Decode scratch grows with it:
#: 65 MB for every whole pool of 120 GB of an 8B model. A step that shares even more is computed
#: without a graph, over tables of its own.
_MAX_SHARING: Final = 4

#: Of the adapter in the largest step that is measured where several devices compute a model.
_MEASURED_RANK: Final = 64


def make_device_runner(
    model: Transformer,
    pool: PagePool,
    *,
    max_step_tokens: int,
    max_running: int,
    recorder: GraphRecorder | None = None,
    grammars: GrammarMasks | None = None,
) -> DeviceRunner:
    """Return a runner whose decode steps are recorded.

    Args:
        recorder: default: CUDA graphs on a GPU, none elsewhere (under the Triton interpreter).
        grammars: see `DeviceRunner`.
    """
    pages_of_one = pool.layout.pages_for_tokens(model.max_model_len)
    capacity = StepCapacity(
        max_tokens=max_step_tokens,
        max_sequences=max_running,
        max_pages=min(_MAX_SHARING * pool.num_pages, max_running * pages_of_one),
    )
    if recorder is None:
        is_cuda = pool.device.type == "cuda"
        is_watched = model.group is not None
        recorder = CudaGraphRecorder(is_watched=is_watched) if is_cuda else DirectRecorder()
    runner = DeviceRunner(
        model,
        pool,
        device_backend(kernel_model(pool), capacity, pool.device, model.group),
        max_step_tokens=max_step_tokens,
        max_running=max_running,
        recorder=recorder,
        grammars=grammars,
    )
    runner.record()
    return runner


def warm_up(
    runner: StepRunner,
    layout: PoolLayout,
    *,
    max_step_tokens: int,
    max_running: int,
    max_model_len: int,
) -> None:
    """Run a long step with an adapter, so that no request waits while its kernels are compiled,
    and a long and a short one with a weighted adapter.

    Those of other decodes were compiled when they were recorded. Writes rubbish into the pool's
    first page, and reads it as an adapter.
    """
    num_each = max(1, min(max_step_tokens, max_model_len - 1))
    plan = long_plan(layout, num_each, num_sequences=min(max_running, max_step_tokens // num_each))
    runner.launch(_with_adapter(plan, layout, weight=1.0)).result()
    for weighted in (plan, long_plan(layout, 1, num_sequences=1)):
        runner.launch(_with_adapter(weighted, layout, weight=0.5)).result()


def _with_adapter(plan: Plan, layout: PoolLayout, weight: float, rank: int = 1) -> Plan:
    """Return the plan for an adapter of this rank, with everything in the pool's first page."""
    ranks = ((rank,) * len(PROJECTIONS),) * layout.geometry.num_layers
    adapter = AdapterLayout(layout, AdapterSpec(ranks))
    manifest = AdapterManifest("warm-up", path="", spec=AdapterSpec(ranks))
    steps = [
        replace(
            step,
            request=replace(step.request, adapter=manifest, adapter_weight=weight),
            block_table=(0,) * len(step.block_table),
        )
        for step in plan.sequences
    ]
    adapters = {"warm-up": PlannedAdapter(adapter, (0,) * adapter.num_pages)}
    return Plan(tuple(steps), loads=(), adapters=adapters)


def make_stream_writer(pool: PagePool) -> StreamWriter:
    """Return what loads adapters beside the steps; its kernel is compiled by a first, empty load.

    Writes zeros into the pool's first page.
    """
    writer = StreamWriter(pool, scatter_pages)
    empty = writer.buffer(1)
    empty.slab[0].zero_()
    writer.write([0], empty, after=writer.fence())
    return writer


def measure_step_bytes(
    model: Transformer, layout: PoolLayout, *, max_step_tokens: int, max_running: int
) -> int:
    """Run the largest step once and return what it needs besides weights and pool, in bytes.

    That includes tables and scratch, but only for the few pages of this step. All of it is free
    again on return: who asks what the device has left next must not count it twice.
    """
    plan = largest_plan(layout, max_step_tokens, max_running, model.max_model_len)
    num_pages = sum(len(step.block_table) for step in plan.sequences)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    pool = PagePool(layout, num_pages, dtype=model.dtype, device=model.device)
    runner = make_device_runner(
        model,
        pool,
        max_step_tokens=max_step_tokens,
        max_running=max_running,
        recorder=DirectRecorder(),
    )
    runner.launch(plan).result()
    if layout.num_ranks > 1:  # what they exchange for adapters is made anew in each step
        runner.launch(_with_adapter(plan, layout, 1.0, _MEASURED_RANK)).result()
    peak = torch.cuda.max_memory_allocated(model.device) - before
    del runner
    step_bytes = peak - num_pages * pool.page_bytes
    del pool
    gc.collect()  # the runner and its graphs know each other
    torch.cuda.empty_cache()
    return step_bytes


def largest_plan(
    layout: PoolLayout, max_step_tokens: int, max_running: int, max_model_len: int
) -> Plan:
    """Return a plan of as many tokens and as many sampled sequences as a step may have."""
    num_each = min(max_step_tokens // max_running, max_model_len - 1)
    return long_plan(layout, num_each, max_running)


def long_plan(layout: PoolLayout, num_each: int, num_sequences: int) -> Plan:
    """Return a plan of whole prompts of the base model, each on pages of its own."""
    pages_each = layout.pages_for_tokens(num_each)
    prompt = (0,) * num_each
    sampling = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9)
    sequences = [
        SequenceStep(
            request=Request(str(index), prompt, sampling),
            start=0,
            num_tokens=num_each,
            token_ids=prompt,
            block_table=tuple(range(index * pages_each, (index + 1) * pages_each)),
            is_sampled=True,
        )
        for index in range(num_sequences)
    ]
    return Plan(sequences=tuple(sequences), loads=(), adapters={})
