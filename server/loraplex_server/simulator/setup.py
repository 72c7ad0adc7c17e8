"""Which engine is simulated on which device, and making it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from loraplex_memory.accounts import PoolAccounts
from loraplex_memory.host_tier import HostTier
from loraplex_memory.layout import PoolLayout
from loraplex_scheduler.limits import SchedulerLimits
from loraplex_scheduler.policies import (
    S_LORA,
    PolicyChoice,
    make_eviction,
    make_policies,
)
from loraplex_scheduler.scheduler import Scheduler
from loraplex_server.simulator.errors import SimulationError
from loraplex_server.simulator.fleet import Fleet
from loraplex_server.simulator.hardware import Hardware
from loraplex_server.simulator.link import AdapterLink
from loraplex_server.simulator.models import ELEM_BYTES, AdapterSet, Setting, SimulatedModel
from loraplex_server.simulator.object_store import ObjectStore, StoreSpeed
from loraplex_server.simulator.replica import EngineParts
from loraplex_server.simulator.requests import RequestBook
from loraplex_server.simulator.results import Outcome
from loraplex_server.simulator.roofline import Inefficiency, Roofline
from loraplex_server.simulator.routing.router import Router
from loraplex_server.simulator.slora import GATE_STEPS, EarlyAbort, Gate
from loraplex_server.simulator.trace import Trace

#: S-LoRA's engine beside the roofline of an A100, and of an A10G, on which its host is less in the
#: way: see docs/benchmarks/simulator.md.
S_LORA_INEFFICIENCY: Final = Inefficiency(factor=2.1)
S_LORA_ON_A10G: Final = Inefficiency(factor=1.4)

#: Tokens of a step on an A100: about so many take as long to compute as the weights, K and V of
#: a full batch take to read, so that prefill hides behind decodes (Sarathi-Serve, section 4).
A100_STEP_TOKENS: Final = 512

#: Memory that neither weights nor pool can have: activations, workspace, the CUDA context.
_RESERVED_BYTES: Final = 2e9
_USABLE_SHARE: Final = 0.92

#: S-LoRA's defaults: prompts of one prefill in shares of the pool, and running requests.
_SLORA_PREFILL_SHARE: Final = 6
_SLORA_MAX_RUNNING: Final = 1000


@dataclass(frozen=True)
class EngineSetup:
    """One engine on one device.

    Attributes:
        pool_tokens: size of the pool in tokens of KV; None for what the device has room for.
        is_slora: S-LoRA's engine (see `slora`), whatever `policy` says of batching and loads.
        gate_steps: decode steps between two looks at the queue, of S-LoRA's engine.
        aborts_early: with S-LoRA's early abort, for a TTFT SLO of so many seconds.
        promise_s: every request asks for its first token within so many seconds.
        host_bytes: host memory for adapters.
        store: what adapter files come from that are not in host memory; None: all are on the disk.
        reads_adapters_per_row: None for what the engine does by itself.
    """

    model: SimulatedModel
    hardware: Hardware
    adapters: AdapterSet
    policy: PolicyChoice = field(default_factory=PolicyChoice)
    inefficiency: Inefficiency = field(default_factory=Inefficiency)
    pool_tokens: int | None = None
    page_tokens: int = 16
    max_running: int = 256
    max_step_tokens: int = 2048
    max_loading: int = 4
    host_bytes: float = 256e9
    is_slora: bool = False
    gate_steps: int = GATE_STEPS
    aborts_early: float | None = None
    promise_s: float | None = None
    store: StoreSpeed | None = None
    reads_adapters_per_row: bool | None = None

    @property
    def num_layers(self) -> int:
        return self.model.geometry.num_layers

    @property
    def num_pages(self) -> int:
        """Pages of the pool.

        Raises:
            SimulationError: the model does not fit into the device.
        """
        page_tokens = self.page_tokens
        if self.pool_tokens is not None:
            return self.pool_tokens // page_tokens
        room = self.hardware.memory * _USABLE_SHARE - _RESERVED_BYTES - self.model.weight_bytes
        num_pages = int(room / (self.model.kv_bytes * page_tokens))
        if num_pages < 1:
            raise SimulationError(
                f"{self.model.name} needs {self.model.weight_bytes / 1e9:.0f} GB for its weights "
                f"alone, {self.hardware.key} has {self.hardware.memory / 1e9:.0f}: "
                "choose a smaller model or larger hardware"
            )
        return num_pages


def ours(setting: Setting, hardware: Hardware, **changes: object) -> EngineSetup:
    """Return this project's engine."""
    setup = EngineSetup(setting.model, hardware, setting.adapters)
    return replace(setup, **changes)  # type: ignore[arg-type]  # names are checked by `replace`


def slora(setting: Setting, hardware: Hardware, **changes: object) -> EngineSetup:
    """Return S-LoRA's engine."""
    setup = EngineSetup(
        setting.model,
        hardware,
        setting.adapters,
        policy=S_LORA,
        inefficiency=S_LORA_INEFFICIENCY,
        page_tokens=1,
        max_running=_SLORA_MAX_RUNNING,
        max_loading=10_000,
        is_slora=True,
    )
    setup = replace(setup, **changes)  # type: ignore[arg-type]  # names are checked by `replace`
    num_tokens = setup.num_pages * setup.page_tokens
    step_tokens = max(num_tokens // _SLORA_PREFILL_SHARE, 2 * _SLORA_MAX_RUNNING)
    return replace(setup, max_step_tokens=step_tokens)


def make_parts(setup: EngineSetup) -> EngineParts:
    """Make the objects of one replica."""
    layout = PoolLayout(setup.model.geometry, setup.page_tokens)
    roofline = Roofline(setup.model, setup.hardware, layout, setup.inefficiency)
    limits = SchedulerLimits(
        max_step_tokens=setup.max_step_tokens,
        max_running=setup.max_running,
        max_model_len=32_768,
        max_loading=setup.max_loading,
    )
    policies = make_policies(setup.policy, limits, setup.page_tokens)
    gate = None
    if setup.is_slora:
        gate = Gate(policies.admission, setup.gate_steps)
        policies = replace(policies, batching=gate, admission=gate.admission)
    if setup.aborts_early is not None:
        queue = EarlyAbort(setup.aborts_early)
        policies = replace(policies, queue=queue, overload=queue)
    accounts = PoolAccounts(
        layout,
        setup.num_pages,
        eviction=make_eviction(setup.policy),
        costs=policies.times,
        has_prefix_cache=setup.policy.has_prefix_cache,
    )
    page_bytes = layout.page_bytes(ELEM_BYTES)
    link = AdapterLink(
        HostTier(int(setup.host_bytes / page_bytes)),
        copy_page_s=roofline.adapter_s(1),
        disk_page_s=page_bytes / setup.hardware.disk,
    )
    per_row = setup.reads_adapters_per_row
    return EngineParts(
        scheduler=Scheduler(limits, accounts, policies),
        accounts=accounts,
        link=link,
        roofline=roofline,
        blocking=gate,
        reads_adapters_per_row=setup.is_slora if per_row is None else per_row,
        store=ObjectStore(setup.store) if setup.store else None,
        page_bytes=page_bytes,
    )


def make_book(setup: EngineSetup, trace: Trace) -> RequestBook:
    """Make the requests that a trace asks of such engines."""
    return RequestBook(trace, setup.adapters, setup.num_layers, promise_s=setup.promise_s)


def simulate(
    setup: EngineSetup, trace: Trace, *, num_replicas: int = 1, router: Router | None = None
) -> Outcome:
    """Run a trace through one engine, or a fleet of such engines."""
    return Fleet(make_book(setup, trace), lambda: make_parts(setup), num_replicas, router).run()
