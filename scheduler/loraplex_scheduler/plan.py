"""What crosses between scheduler and those who compute: plans, results, events. Data only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple

from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_scheduler.sampling import SamplingParams


class FinishReason(StrEnum):
    """How a request ended; exactly one per request.

    `REFUSED`: it could never have run here, or asks for what excludes each other. `REJECTED`: not
    now, because too much is asked for.
    """

    STOP = "stop"
    LENGTH = "length"
    REFUSED = "refused"
    REJECTED = "rejected"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    FAILED = "failed"


class Pooling(StrEnum):
    """Which final hidden states, after the last norm, make a prompt's embedding."""

    LAST = "last"
    MEAN = "mean"


@dataclass(frozen=True)
class Request:
    """One sequence to generate, as the scheduler accepts it; `n` samples are `n` requests.

    Attributes:
        request_id: unique among live requests.
        adapter: what to load before the first token; None for the base model.
        arrival_s: on the clock that `Scheduler.expire` is given; decides the order of service.
        deadline_s: past it the request ends as timed out; None for never.
        first_token_by_s: reject the request, now or while it waits, rather than let its first
            token come later than this; None for no such promise. On the same clock.
        tenant: on whose account it runs; decides fairness between tenants.
        priority: lower ones are served first, whoever asks (as in vLLM).
        adapter_start: index of the first token that the adapter changes; those before it are
            computed as the base computes them. Of an activated LoRA alone above 0.
        num_virtual: leading tokens of the prompt that stand for the adapter's own, with ids from
            the size of the vocabulary on. They have KV, but are nobody's text.
        adapter_weight: factor on all that `adapter` adds; only of one that `is_additive`.
        more_adapters: others, each with its weight, whose additions are added to the first one's;
            all of them different, and only where all are additive.
        pooling: nothing is generated: the request ends with its prompt's embedding. Its sampling
            has `max_tokens` 1 and no other wish.
        prefix_salt: its prompt's keys and values are shared with requests of the same salt alone.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: AdapterManifest | None = None
    arrival_s: float = 0.0
    deadline_s: float | None = None
    first_token_by_s: float | None = None
    tenant: str = ""
    priority: int = 0
    adapter_start: int = 0
    num_virtual: int = 0
    adapter_weight: float = 1.0
    more_adapters: tuple[tuple[AdapterManifest, float], ...] = ()
    pooling: Pooling | None = None
    prefix_salt: str = ""

    @property
    def needs_whole_prompt(self) -> bool:
        """Something is wanted of each token of the prompt, and no cached page has it."""
        return self.pooling is Pooling.MEAN or self.sampling.prompt_logprobs is not None

    @property
    def adapters(self) -> tuple[tuple[AdapterManifest, float], ...]:
        """All of them with their weights, the first one first."""
        if self.adapter is None:
            return ()
        return (self.adapter, self.adapter_weight), *self.more_adapters


@dataclass(frozen=True)
class AdapterLoad:
    """Fill these pages with this adapter, beside the step."""

    adapter: AdapterManifest
    layout: AdapterLayout
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlannedAdapter:
    """Where an adapter of this step lies; valid for this step only."""

    layout: AdapterLayout
    pages: tuple[int, ...]


_NO_TOKENS: Final[frozenset[int]] = frozenset()

#: Hidden states are summed as integers, multiples of this: then no order of adding and no way of
#: cutting a prompt into steps shows in the sum. An int64 holds states of 1e4 of 200,000 tokens.
HIDDEN_UNIT: Final = 2.0**-32


@dataclass(slots=True)
class SequenceStep:
    """The part of one sequence that a step computes. Never changed once it is in a plan.

    Hundreds are made per step, so it is not a frozen dataclass, which takes three times as long to
    make, and what never changes of a sequence is read from its request.

    Attributes:
        start: the step computes the tokens `[start, start + num_tokens)`; those before have KV.
        token_ids: the ids of these tokens, but for an awaited one.
        block_table: pages covering all of them; a snapshot, never changed.
        is_sampled: the step reaches the sequence's last token, so its next one is drawn.
        awaits_token: one more token follows `token_ids`: the one that the step launched last, just
            before this one, samples for this request. Nobody on the host knows its id yet.
        history: all token ids so far but virtual ones, which are no text; only filled in when the
            sampling needs it.
        banned_token_ids: never chosen now (end tokens before `min_tokens`).
        wants_states: the request wants something of the final hidden states of this span, beside
            the next token or instead of it: log probabilities of its prompt, or an embedding.
    """

    request: Request
    start: int
    num_tokens: int
    token_ids: tuple[int, ...]
    block_table: Sequence[int]
    is_sampled: bool
    awaits_token: bool = False
    history: tuple[int, ...] = ()
    banned_token_ids: frozenset[int] = _NO_TOKENS
    wants_states: bool = False

    @property
    def is_drawn(self) -> bool:
        """A token is drawn for the sequence in this step."""
        return self.is_sampled and self.request.pooling is None

    @property
    def scored_positions(self) -> range:
        """The positions of this span whose next token is of the prompt, if it wants to know what
        the model thought of that one.
        """
        request = self.request
        if not self.wants_states or request.pooling or request.sampling.prompt_logprobs is None:
            return range(0)
        stop = min(self.start + self.num_tokens, self.num_prompt - 1)
        return range(max(self.start, self.request.num_virtual), stop)

    @property
    def pooled_positions(self) -> range:
        """The positions of this span whose final hidden states go into the embedding."""
        stop = self.start + self.num_tokens
        if self.request.pooling is Pooling.MEAN:
            return range(max(self.start, self.request.num_virtual), stop)
        is_last = self.request.pooling is Pooling.LAST and self.is_sampled
        return range(stop - 1, stop) if is_last else range(0)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def adapter_id(self) -> str | None:
        adapter = self.request.adapter
        return adapter.adapter_id if adapter is not None else None

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def num_prompt(self) -> int:
        """How many of the sequence's tokens are the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_prompt_text(self) -> int:
        """How many of `history` are the prompt."""
        return self.num_prompt - self.request.num_virtual

    @property
    def position(self) -> int:
        """Position of the token to be drawn; keys the random draw with the seed."""
        return self.start + self.num_tokens


@dataclass(frozen=True)
class Plan:
    """The decision of one step. Sequences with one token come first (see AttentionBatch).

    Attributes:
        sequences: what to compute; empty when everything waits for a load.
        loads: adapters to start loading; their sequences are in no plan until they are loaded.
        adapters: every adapter that `sequences` name, by id.
        prefetches: adapters to bring into host memory beside the steps, most wanted first; a hint
            that nobody waits for.
    """

    sequences: tuple[SequenceStep, ...]
    loads: tuple[AdapterLoad, ...]
    adapters: dict[str, PlannedAdapter]
    prefetches: tuple[AdapterManifest, ...] = ()


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities (natural logarithm, of the distribution before penalties and filters)."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class SampledToken(NamedTuple):
    """One drawn token. A tuple, as are token events: hundreds are made and sent per step."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class StepResult:
    """One token per sampled sequence, by request id; or why there can be none.

    A sequence that awaits a token which turns out not to exist may report anything: its request
    has ended by the time this is booked.

    Attributes:
        prompt_logprobs: of sequences that ask for them, one entry for each of their step's
            `scored_positions`: what the model thought of the token behind it.
        embeddings: of sequences that are pooled by their last token, float32.
        dead_ends: why sequences may choose no token, by what they ask for themselves: they are
            refused. Unlike those of `failures`, what they computed is sound.
        hidden_sums: of sequences that are pooled by their mean, the sum over the step's
            `pooled_positions`, in units of `HIDDEN_UNIT`.
    """

    tokens: dict[str, SampledToken]
    failures: dict[str, str] = field(default_factory=dict)
    prompt_logprobs: dict[str, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    embeddings: dict[str, tuple[float, ...]] = field(default_factory=dict)
    hidden_sums: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dead_ends: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StartTimes:
    """How a sequence came to its first token, in seconds that add up to the time since arrival.

    Attributes:
        queue_s: waited for its turn, for pages or for company.
        load_s: waited for its adapters alone.
        prefill_s: from its first step on; includes being preempted.
    """

    queue_s: float
    load_s: float
    prefill_s: float


class TokenEvent(NamedTuple):
    """One more token of a request; the last one carries the finish reason.

    `num_cached`, on the first one only: tokens of the prompt that were found in the prefix cache,
    virtual ones not counted. `times` as well.
    """

    request_id: str
    token: SampledToken
    finish_reason: FinishReason | None = None
    num_cached: int = 0
    times: StartTimes | None = None


@dataclass(frozen=True)
class PromptEvent:
    """What the model thought of the next tokens of a request's prompt, before its first token.

    The first event of a request begins with its second token: nothing precedes the first.
    """

    request_id: str
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: None = None


@dataclass(frozen=True)
class EndEvent:
    """A request ended without a token: refused, rejected, cancelled, timed out or failed.

    Or, with `finish_reason` STOP, embedded.

    Attributes:
        retry_after_s: when to come again, of one that was rejected.
        embedding: of one with `pooling`.
        times: of one with `pooling`.
    """

    request_id: str
    finish_reason: FinishReason
    message: str = ""
    retry_after_s: float | None = None
    embedding: tuple[float, ...] | None = None
    times: StartTimes | None = None


Event = TokenEvent | PromptEvent | EndEvent
