"""Engine cores over one loaded model, and a driver that checks the accounts after every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loraplex_memory.adapter_file import write_adapter_file
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_memory.host_arena import HostArena
from loraplex_memory.layout import ModelGeometry, PoolLayout
from loraplex_memory.pool import PagePool
from loraplex_scheduler.limits import SchedulerLimits
from loraplex_scheduler.plan import EndEvent, Event, Request, TokenEvent
from loraplex_scheduler.policies import PolicyChoice
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.build import assemble_core
from loraplex_server.engine.constraints import Constraints
from loraplex_server.engine.core import EngineCore
from loraplex_server.engine.gpu_engine import make_device_runner, make_stream_writer
from loraplex_server.engine.grammar_compiler import GrammarCompiler
from loraplex_server.model.transformer import Transformer
from tests.support.kernel_cases import make_weights


def make_core(
    model: Transformer,
    *,
    num_pages: int = 512,
    max_step_tokens: int = 256,
    max_running: int = 32,
    max_model_len: int = 512,
    wake: Callable[[], None] = lambda: None,
    make_pool: Callable[..., PagePool] = PagePool,
    choice: PolicyChoice | None = None,
    num_host_pages: int = 0,
    tokenizer: Any = None,
) -> EngineCore:
    """Return a core with a pool of its own over the given model.

    Args:
        tokenizer: of transformers; without one, grammars are refused.
    """
    limits = SchedulerLimits(
        max_step_tokens=max_step_tokens,
        max_running=max_running,
        max_model_len=max_model_len,
        eos_token_ids=model.spec.eos_token_ids,
    )
    layout = PoolLayout(model.spec.geometry)
    pool = make_pool(layout, num_pages, dtype=model.dtype)
    arena = HostArena(layout, num_host_pages, dtype=model.dtype)
    constraints = make_constraints(model, tokenizer, wake) if tokenizer is not None else None
    return assemble_core(
        model, pool, limits, wake, choice=choice, arena=arena, constraints=constraints
    )


def make_constraints(
    model: Transformer, tokenizer: Any, wake: Callable[[], None] = lambda: None
) -> Constraints:
    """Return the grammars of an engine over the given model."""
    compiler = GrammarCompiler(model.spec.vocab_size, model.spec.eos_token_ids, wake)
    compiler.learn_tokens(tokenizer.backend_tokenizer.to_str())
    return Constraints(compiler)


def make_device_core(
    model: Transformer,
    *,
    num_pages: int = 256,
    max_step_tokens: int = 64,
    max_running: int = 8,
    max_model_len: int = 128,
    overlap: bool = True,
    tokenizer: Any = None,
) -> EngineCore:
    """Return a core whose steps run through the Triton kernels, on the model's device."""
    limits = SchedulerLimits(
        max_step_tokens=max_step_tokens,
        max_running=max_running,
        max_model_len=max_model_len,
        eos_token_ids=model.spec.eos_token_ids,
    )
    layout = PoolLayout(model.spec.geometry)
    pool = PagePool(layout, num_pages, dtype=model.dtype, device=model.device)
    writer = make_stream_writer(pool) if model.device.type == "cuda" else None
    constraints = make_constraints(model, tokenizer) if tokenizer is not None else None
    runner = make_device_runner(
        model,
        pool,
        max_step_tokens=max_step_tokens,
        max_running=max_running,
        grammars=constraints,
    )
    return assemble_core(
        model,
        pool,
        limits,
        runner=runner,
        writer=writer,
        overlap=overlap,
        constraints=constraints,
    )


class GatedPool(PagePool):
    """Takes an adapter only once the file `gate` exists: a disk as slow as a test wants it."""

    def __init__(self, gate: Path, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._gate = gate

    def write(self, pages: Sequence[int], packed: torch.Tensor) -> None:
        while not self._gate.exists():
            time.sleep(0.01)
        super().write(pages, packed)


def save_adapter(
    folder: Path, geometry: ModelGeometry, *, name: str = "a", rank: int = 4, seed: int = 1
) -> AdapterManifest:
    """Write an adapter of random weights on every linear and return its manifest."""
    generator = torch.Generator().manual_seed(seed)
    weights = AdapterWeights(make_weights(geometry, [[rank] * 7] * geometry.num_layers, generator))
    path = folder / f"{name}.safetensors"
    write_adapter_file(path, weights)
    return AdapterManifest(name, str(path), weights.spec(geometry.num_layers))


def greedy_request(
    request_id: str,
    prompt: Sequence[int],
    adapter: AdapterManifest | None = None,
    *,
    max_tokens: int = 24,
    ignore_eos: bool = False,
) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=ignore_eos)
    return Request(request_id, tuple(prompt), sampling, adapter)


def requests_for(
    cases: Sequence[tuple[str, str | None, Sequence[int]]],
    manifests: Mapping[str, AdapterManifest],
    **options: Any,
) -> list[Request]:
    """Return greedy requests of (id, adapter or None, prompt); `options` as of `greedy_request`."""
    return [
        greedy_request(case_id, prompt, manifests[adapter] if adapter else None, **options)
        for case_id, adapter, prompt in cases
    ]


def drive(core: EngineCore, requests: Sequence[Request]) -> dict[str, list[int]]:
    """Run all requests to their end; return their tokens. Every one must finish normally."""
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    open_ids = set(tokens)
    events = [event for request in requests for event in core.add(request)]
    for _ in range(20_000):
        for event in events:
            assert event.request_id in open_ids, "an event after the terminal one"
            assert not isinstance(event, EndEvent), event
            assert isinstance(event, TokenEvent)
            tokens[event.request_id].append(event.token.token_id)
            if event.finish_reason is not None:
                open_ids.remove(event.request_id)
        if not core.has_work:
            break
        events = core.step(load_timeout_s=5.0)
        core.check()
    assert not open_ids
    return tokens


def finish(core: EngineCore, requests: Sequence[Request]) -> dict[str, list[Event]]:
    """Run all requests to whatever end; return the events of each, the last of which ends it."""
    events: dict[str, list[Event]] = {request.request_id: [] for request in requests}
    for event in (event for request in requests for event in core.add(request)):
        events[event.request_id].append(event)
    for _ in range(20_000):
        if not core.has_work:
            break
        for event in core.step(load_timeout_s=5.0):
            events[event.request_id].append(event)
        core.check()
    for own in events.values():
        assert [e.finish_reason is not None for e in own] == [*[False] * (len(own) - 1), True]
    return events
