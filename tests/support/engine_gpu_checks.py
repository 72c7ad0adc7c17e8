"""The engine on a device against the engine on a CPU: logits, tokens, memory under pressure.

On a GPU the kernels are compiled and decode steps are CUDA graphs; on a CPU the Triton interpreter
computes, and a replay is a call. No pytest here: `gpu_suite.py` runs these, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from loraplex_kernels.model_tables import StepCapacity
from loraplex_kernels.ops import DeviceBackend, device_backend
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.layout import PoolLayout
from loraplex_memory.pool import PagePool
from loraplex_scheduler.plan import Request
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.build import build_core, resolve_facts
from loraplex_server.config import Config
from loraplex_server.engine.gpu_engine import measure_step_bytes
from loraplex_server.model.transformer import Transformer, kernel_model
from tests.server.model.paged_run import PagedRun
from tests.support.adapter_kinds import make_mixture, save_kinds
from tests.support.adapter_kinds import make_requests as kind_requests
from tests.support.adapter_parts import HEAD_DIM, make_adapters
from tests.support.engine import drive, make_core, make_device_core, save_adapter
from tests.support.kernel_cases import make_weights
from tests.support.tiny_models import (
    VOCAB,
    save_tiny_model,
    tiny_config,
    tiny_reference,
    tiny_spec,
    tiny_transformer,
    transformer_of,
)

RANKS = ((4, 0, 3, 16, 1, 20, 2), (2, 8, 0, 0, 5, 0, 7))


def _tokens(length: int, first: int) -> tuple[int, ...]:
    return tuple(3 + (first + 7 * i) % (VOCAB - 3) for i in range(length))


# ---- one forward pass ----------------------------------------------------------------------

#: Steps of sequences a, b, c: prompts, mixed, decodes of two adapters, a decode of the base.
STEPS = [
    ({"a": _tokens(9, 0), "b": _tokens(1, 1)}, {"a": "x"}),
    ({"a": _tokens(1, 2), "b": _tokens(5, 3), "c": _tokens(6, 4)}, {"a": "x", "c": "y"}),
    ({"a": _tokens(1, 5), "b": _tokens(1, 6), "c": _tokens(1, 7)}, {"a": "x", "b": "x", "c": "y"}),
    ({"b": _tokens(1, 8)}, {}),
]


def backend_of(pool: PagePool, **capacity: int) -> DeviceBackend:
    """Return a small backend over the pool's device; `capacity` overrides its sizes."""
    sizes = {"max_tokens": 64, "max_sequences": 8, "max_pages": 64, "plane_elems": 1 << 16}
    return device_backend(kernel_model(pool), StepCapacity(**{**sizes, **capacity}), pool.device)


def check_logits(
    device: torch.device, family: str, dtype: torch.dtype = torch.float32, **capacity: int
) -> None:
    """Every step's logits are those of the CPU path."""
    model = tiny_transformer(family, dtype=dtype, device=device)
    ours = PagedRun(model, backend=partial(backend_of, **capacity))
    theirs = PagedRun(tiny_transformer(family, dtype=dtype))
    for run in (ours, theirs):
        for name, seed in (("x", 1), ("y", 2)):
            weights = make_weights(model.spec.geometry, RANKS, torch.manual_seed(seed))
            run.load_adapter(name, weights, RANKS)
    tolerance = 3e-5 if dtype is torch.float32 else 6e-2
    for tokens, adapters in STEPS:
        expected = theirs.step(tokens, adapters)
        for name, logits in ours.step(tokens, adapters).items():
            torch.testing.assert_close(logits.cpu(), expected[name], atol=tolerance, rtol=0)


# ---- the engine ----------------------------------------------------------------------------


def make_requests(adapters: list[AdapterManifest]) -> list[Request]:
    """Return greedy, drawn, penalised and logged requests of the base and several adapters."""
    variants = [
        SamplingParams(max_tokens=5, temperature=0.0),
        SamplingParams(max_tokens=6, temperature=1.0, top_p=0.9, seed=3),
        SamplingParams(max_tokens=1, temperature=0.0),
        SamplingParams(max_tokens=4, temperature=0.8, top_k=5, seed=4, repetition_penalty=1.3),
        SamplingParams(max_tokens=4, temperature=0.0, logprobs=2, min_tokens=2),
        SamplingParams(max_tokens=5, temperature=1.0, min_p=0.1, seed=5),
    ]
    owners = [None, *adapters]
    return [
        Request(f"r{i}", _tokens(3 + 3 * i, i), params, owners[i % len(owners)])
        for i, params in enumerate(variants)
    ]


def _save_adapters(folder: str, model: Transformer) -> list[AdapterManifest]:
    return [
        save_adapter(Path(folder), model.spec.geometry, name=f"a{i}", rank=4 + 2 * i, seed=i)
        for i in range(3)
    ]


def check_tokens(device: torch.device, *, overlap: bool) -> None:
    """Requests of all kinds, mixed, get the CPU engine's tokens."""
    model = tiny_transformer(device=device)
    with tempfile.TemporaryDirectory() as folder:
        requests = make_requests(_save_adapters(folder, model))
        reference = make_core(tiny_transformer(), max_step_tokens=32)
        expected = drive(reference, requests)
        core = make_device_core(model, max_step_tokens=32, overlap=overlap)
        try:
            assert drive(core, requests) == expected
        finally:
            core.close()
            reference.close()


#: Under the interpreter, which is slow: an epilogue, virtual tokens, weights per row, ends.
_FEW_KINDS = (None, "scales and biases", "kv prefix", "norms", "head norms", "token rows")


def check_kinds(device: torch.device, *, overlap: bool) -> None:
    """Adapters of every kind, mixed, get the CPU engine's tokens; launches wait for nothing."""
    reference = tiny_reference(tiny_config("qwen3", head_dim=HEAD_DIM))
    is_cuda = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        manifests = save_kinds(Path(folder), make_adapters(reference))
        max_tokens = 6 if is_cuda else 2
        chosen = {name: manifests[name] for name in (manifests if is_cuda else _FEW_KINDS)}
        requests = kind_requests(chosen, max_tokens=max_tokens)
        requests.append(make_mixture("mixture", manifests, max_tokens=max_tokens))
        host_core = make_core(transformer_of(reference))
        model = transformer_of(reference, device=device)
        core = make_device_core(model, max_step_tokens=48, overlap=overlap)
        if is_cuda:
            torch.cuda.set_sync_debug_mode("error")
        try:
            assert drive(core, requests) == drive(host_core, requests)
        finally:
            if is_cuda:
                torch.cuda.set_sync_debug_mode("default")
            core.close()
            host_core.close()


def check_launches(device: torch.device) -> None:
    """No launch waits for the device; only results and loads may, and they wait for events."""
    model = tiny_transformer(device=device)
    if device.type != "cuda":
        return
    with tempfile.TemporaryDirectory() as folder:
        core = make_device_core(model, max_step_tokens=32)
        requests = make_requests(_save_adapters(folder, model))
        torch.cuda.set_sync_debug_mode("error")
        try:
            drive(core, requests)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            core.close()


def check_build(device: torch.device) -> None:
    """The engine that `loraplex serve` builds here gives the CPU engine's tokens."""
    geometry = tiny_spec().geometry
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_model(Path(folder) / "model")
        adapter = save_adapter(Path(folder), geometry)
        answers = []
        for name in ("cpu", device.type):
            config = Config(
                model=str(Path(folder) / "model"),
                device=name,
                dtype="float32",
                pool_bytes=4 << 20,
                max_step_tokens=32,
                max_running=8,
                threads=1,
            )
            core = build_core(config, resolve_facts(config))
            try:
                answers.append(drive(core, make_requests([adapter])))
            finally:
                core.close()
    assert answers[0] == answers[1]


def check_measuring(device: torch.device) -> None:
    """Measuring the largest step gives back all the memory that it took."""
    if device.type != "cuda":
        return
    model = tiny_transformer(device=device)
    layout = PoolLayout(model.spec.geometry)

    def measure() -> tuple[int, int]:
        step_bytes = measure_step_bytes(model, layout, max_step_tokens=32, max_running=8)
        return step_bytes, torch.cuda.memory_allocated(device)

    measure()  # libraries keep the workspaces that they take the first time
    before = torch.cuda.memory_allocated(device)
    step_bytes, after = measure()
    assert step_bytes > 8 * VOCAB * 4, "less than the logits"
    assert after == before


def check_pressure(device: torch.device) -> None:
    """In a pool too small for all of them, evictions and preemptions change no token."""
    model = tiny_transformer(device=device)
    with tempfile.TemporaryDirectory() as folder:
        requests = make_requests(_save_adapters(folder, model))
        reference = make_core(tiny_transformer())
        expected = drive(reference, requests)
        core = make_device_core(
            model, num_pages=13, max_step_tokens=24, max_running=4, max_model_len=64
        )
        try:
            assert drive(core, requests) == expected
            stats = core.stats()
            assert stats.num_evictions + stats.num_preemptions > 0
        finally:
            core.close()
            reference.close()


ENGINE_CHECKS: list[tuple[str, Callable[[torch.device], None]]] = [
    *(
        (f"logits of {family}", partial(check_logits, family=family))
        for family in ("llama", "qwen3", "phi3", "qwen2")
    ),
    ("logits in bfloat16", partial(check_logits, family="llama", dtype=torch.bfloat16)),
    (
        "logits of steps that outgrow the static tables",
        partial(check_logits, family="llama", max_pages=1, plane_elems=1),
    ),
    ("tokens of steps in turn", partial(check_tokens, overlap=False)),
    ("tokens of overlapped steps", partial(check_tokens, overlap=True)),
    ("tokens of adapters of every kind", partial(check_kinds, overlap=False)),
    ("tokens of adapters of every kind, overlapped", partial(check_kinds, overlap=True)),
    ("tokens under memory pressure", check_pressure),
    ("launches that never wait", check_launches),
    ("memory of the largest step", check_measuring),
    ("the engine that is served", check_build),
]

#: Those that only a GPU can fail.
GPU_ONLY = (check_launches, check_measuring, check_build)
