"""The frozen messages between the API process and the engine process."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from loraplex_scheduler.plan import Event, Request


class EngineState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPED = "stopped"


@dataclass(frozen=True)
class EngineInfo:
    """What does not change while an engine lives; sent once when it is ready."""

    max_model_len: int
    num_pages: int
    page_tokens: int
    page_bytes: int
    num_layers: int
    dtype: str
    device: str


@dataclass(frozen=True)
class EngineStats:
    """A snapshot after a step; counters count since the engine process started."""

    num_running: int = 0
    num_waiting: int = 0
    pages_kv: int = 0
    pages_adapters: int = 0
    pages_free: int = 0
    resident: dict[str, int] = field(default_factory=dict)
    """Pages by adapter id, of adapters ready to serve."""
    loading: tuple[str, ...] = ()
    running_adapters: tuple[str, ...] = ()
    """Ids of the adapters that running sequences use."""
    waiting_adapters: tuple[str, ...] = ()
    num_steps: int = 0
    num_preemptions: int = 0
    num_loads: int = 0
    num_load_failures: int = 0
    num_evictions: int = 0
    prompt_tokens: int = 0
    """Tokens computed that were part of a prompt, recomputation after preemption included."""
    generated_tokens: int = 0
    step_s: float = 0.0
    """Seconds spent inside steps."""


# From the API process to the engine process.


@dataclass(frozen=True)
class Submit:
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Cancel:
    request_ids: tuple[str, ...]


@dataclass(frozen=True)
class DiscardAdapter:
    """The adapter was deleted: free its pages as soon as nobody runs on it."""

    adapter_id: str


@dataclass(frozen=True)
class Shutdown:
    pass


Command = Submit | Cancel | DiscardAdapter | Shutdown


# From the engine process to the API process.


@dataclass(frozen=True)
class Ready:
    info: EngineInfo


@dataclass(frozen=True)
class StepOutput:
    """All events of one step; every so often, and whenever the engine falls idle, its state."""

    events: tuple[Event, ...]
    stats: EngineStats | None


@dataclass(frozen=True)
class StartFailed:
    """The engine could not be built; it exits after this."""

    message: str


Reply = Ready | StepOutput | StartFailed
