"""The frozen messages between the API process and the engine process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_scheduler.plan import (
    EndEvent,
    Event,
    FinishReason,
    PromptEvent,
    Request,
    SampledToken,
    StartTimes,
    TokenEvent,
    TokenLogprobs,
)


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
    """Of all arithmetic, and what weights are rounded to besides: see `Transformer.precision`."""
    device: str


@dataclass(frozen=True)
class EngineStats:
    """A snapshot after a step; counters count since the engine process started.

    The five page counts that are not by adapter add up to the pages of the pool.
    """

    num_running: int = 0
    num_waiting: int = 0
    pages_kv: int = 0
    """Pages that one sequence owns alone; those of the prefix cache are not among them."""
    pages_prefix_used: int = 0
    """Pages of the prefix cache that running sequences refer to."""
    pages_prefix_idle: int = 0
    """Pages of the prefix cache that nobody refers to: given up whenever pages are wanted."""
    pages_adapters: int = 0
    pages_free: int = 0
    prefix_pages_by_adapter: dict[str, int] = field(default_factory=dict)
    """Pages of the prefix cache, used and idle, by adapter id; "" stands for the base model."""
    resident: dict[str, int] = field(default_factory=dict)
    """Pages by adapter id, of adapters ready to serve."""
    loading: tuple[str, ...] = ()
    running_adapters: tuple[str, ...] = ()
    """Ids of the adapters that running sequences use."""
    waiting_adapters: tuple[str, ...] = ()
    num_steps: int = 0
    num_preemptions: int = 0
    num_rejected: int = 0
    """Requests that ended as rejected, on arrival or while they waited."""
    num_loads: int = 0
    num_load_failures: int = 0
    load_s: float = 0.0
    """Seconds that the `num_loads` took, without their time in the loader's queue."""
    num_evictions: int = 0
    """Adapters that left the pool."""
    num_prefix_evictions: int = 0
    """Pages of the prefix cache that were given up."""
    num_prefetches: int = 0
    """Adapters brought into host memory before anybody waited for them."""
    num_host_hits: int = 0
    """Loads that found their adapter in host memory."""
    host_bytes: int = 0
    """Host memory that packed adapters take now."""
    host_capacity_bytes: int = 0
    host_adapters: tuple[str, ...] = ()
    """Ids of the adapters in host memory, whether or not they are in the pool as well."""
    prefix_hit_tokens: int = 0
    """Prompt tokens that the prefix cache held when their sequence began."""
    prefix_query_tokens: int = 0
    """Prompt tokens that were looked for in it."""
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
    """The adapter was deleted: free its pages as soon as nobody runs on it, then say so."""

    adapter_id: str


@dataclass(frozen=True)
class KeepAdapters:
    """From now on these, and no others, leave the pool only where a request could not run else."""

    adapter_ids: frozenset[str]


@dataclass(frozen=True)
class PrefetchAdapter:
    """Somebody expects to use the adapter soon: bring it nearer, if there is time and room."""

    manifest: AdapterManifest


@dataclass(frozen=True)
class LearnTokens:
    """Compile grammars for this tokenizer, JSON of the `tokenizers` library; before the first."""

    tokenizer: str


@dataclass(frozen=True)
class Shutdown:
    pass


Command = Submit | Cancel | DiscardAdapter | KeepAdapters | PrefetchAdapter | LearnTokens | Shutdown


# From the engine process to the API process.

#: Of a token event: its log probabilities, its finish reason, its `num_cached`, its `times`.
TokenDetails = tuple[TokenLogprobs | None, FinishReason | None, int, StartTimes | None]


@dataclass(frozen=True)
class Ready:
    info: EngineInfo


@dataclass(frozen=True)
class StepOutput:
    """All events of one step; every so often, and whenever the engine falls idle, its state.

    Tokens travel in columns, which are packed in a tenth of the time that as many objects take,
    and most tokens have nothing to tell but their ids.

    Attributes:
        request_ids, token_ids: of all token events, in their order.
        details: what else there is of those that have it, by their position.
        ends: events that end a request without a token.
        prompts: of prompts; they precede all tokens of their requests.
    """

    request_ids: tuple[str, ...]
    token_ids: tuple[int, ...]
    details: dict[int, TokenDetails]
    ends: tuple[EndEvent, ...]
    stats: EngineStats | None
    prompts: tuple[PromptEvent, ...] = ()

    @classmethod
    def of(cls, events: Iterable[Event], stats: EngineStats | None = None) -> Self:
        """Return the message for a step's events."""
        request_ids: list[str] = []
        token_ids: list[int] = []
        details: dict[int, TokenDetails] = {}
        ends: list[EndEvent] = []
        prompts: list[PromptEvent] = []
        for event in events:
            if isinstance(event, EndEvent):
                ends.append(event)
                continue
            if isinstance(event, PromptEvent):
                prompts.append(event)
                continue
            request_id, (token_id, logprobs), finish_reason, num_cached, times = event
            if logprobs is not None or finish_reason is not None or num_cached or times:
                details[len(token_ids)] = logprobs, finish_reason, num_cached, times
            request_ids.append(request_id)
            token_ids.append(token_id)
        return cls(
            tuple(request_ids), tuple(token_ids), details, tuple(ends), stats, tuple(prompts)
        )

    @property
    def events(self) -> list[Event]:
        """The events, made anew: those of each request in their order."""
        events: list[Event] = [
            TokenEvent(request_id, SampledToken(token_id))
            for request_id, token_id in zip(self.request_ids, self.token_ids, strict=True)
        ]
        for index, (logprobs, finish_reason, num_cached, times) in self.details.items():
            token = SampledToken(self.token_ids[index], logprobs)
            request_id = self.request_ids[index]
            events[index] = TokenEvent(request_id, token, finish_reason, num_cached, times)
        return [*self.prompts, *events, *self.ends]


@dataclass(frozen=True)
class FreedMemory:
    """What an adapter took of the engine's memory when it was discarded.

    Attributes:
        weight_pages, prefix_pages: of the pool.
        host_bytes: of host memory.
    """

    weight_pages: int = 0
    prefix_pages: int = 0
    host_bytes: int = 0


@dataclass(frozen=True)
class AdapterDiscarded:
    """Nothing of the adapter is in pool or host memory any more."""

    adapter_id: str
    freed: FreedMemory


@dataclass(frozen=True)
class StartFailed:
    """The engine could not be built; it exits after this."""

    message: str


Reply = Ready | StepOutput | AdapterDiscarded | StartFailed
