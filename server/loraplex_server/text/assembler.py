"""One sequence's engine events into text: the last step before an answer is written down.

Invariant: `push` returns exactly one delta with a finish reason; after it the sequence is finished
and further events are ignored. A stop string ends the sequence here, before the engine knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from loraplex_scheduler.plan import (
    EndEvent,
    Event,
    FinishReason,
    PromptEvent,
    SampledToken,
    StartTimes,
    TokenLogprobs,
)
from loraplex_server.text.detokenizer import make_detokenizer
from loraplex_server.text.stops import StopMatcher
from loraplex_server.text.vocabulary import Vocabulary


@dataclass(frozen=True)
class TextOptions:
    """How a request wants its tokens written down; the engine knows nothing of it."""

    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0
    """Stop strings are not looked for in the text of the first so many tokens."""


@dataclass(slots=True)
class TextDelta:
    """What some events added to a sequence.

    Attributes:
        tokens: the tokens that arrived, also those whose text is held back or is no text.
        finish_reason: set in the last delta only.
        stop_reason: the stop string or stop token id that ended the sequence; None for the model's
            own end or any other reason (as in vLLM).
        message: why a sequence failed or timed out.
        retry_after_s: of a sequence that was rejected, when to come again.
        prompt_logprobs: of the prompt's next tokens; the first delta's begin with the second token.
        embedding: of a sequence that was pooled instead of continued.
        times: how the sequence came to its first token; with that token, or the embedding.
    """

    text: str = ""
    tokens: list[SampledToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    message: str = ""
    retry_after_s: float | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    embedding: tuple[float, ...] | None = None
    times: StartTimes | None = None

    @property
    def is_empty(self) -> bool:
        has_any = self.text or self.tokens or self.prompt_logprobs
        return not has_any and self.finish_reason is None


class TextAssembler:
    """Owned by whoever reads the events of one request; not thread-safe.

    Attributes:
        num_tokens: tokens of the answer so far.
        num_cached: tokens of the prompt that the engine did not have to compute.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        options: TextOptions,
        *,
        prompt_ids: Sequence[int] = (),
        stop_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Prepare for the events of a request.

        Args:
            prompt_ids: the prompt; its last tokens decide how the first new one is written.
            stop_token_ids: those of its SamplingParams; only to report `stop_reason`.
        """
        self._detokenizer = make_detokenizer(
            vocabulary, skip_special_tokens=options.skip_special_tokens, prompt_ids=prompt_ids
        )
        self._matcher = StopMatcher(
            options.stop, include_in_output=options.include_stop_str_in_output
        )
        self._options = options
        self._stop_token_ids = stop_token_ids
        self._is_ended_by_engine = False
        self._is_finished = False
        self.num_tokens = 0
        self.num_cached = 0

    @property
    def is_finished(self) -> bool:
        """The delta with the finish reason was returned."""
        return self._is_finished

    @property
    def needs_cancel(self) -> bool:
        """The sequence is finished, but the engine still computes it: cancel the request."""
        return self._is_finished and not self._is_ended_by_engine

    def push(self, events: Iterable[Event]) -> TextDelta:
        """Return what these events, in their order, add to the sequence."""
        delta = TextDelta()
        for event in events:
            if event.finish_reason is not None:
                self._is_ended_by_engine = True
            if self._is_finished:
                continue
            if isinstance(event, EndEvent):
                delta.message = event.message
                delta.retry_after_s = event.retry_after_s
                delta.embedding = event.embedding
                delta.times = delta.times or event.times
                self._finish(delta, event.finish_reason)
            elif isinstance(event, PromptEvent):
                delta.prompt_logprobs += event.logprobs
            else:
                self.num_cached += event.num_cached
                delta.times = delta.times or event.times
                self._push_token(delta, event.token, event.finish_reason)
        return delta

    def _push_token(
        self, delta: TextDelta, token: SampledToken, finish_reason: FinishReason | None
    ) -> None:
        self.num_tokens += 1
        delta.tokens.append(token)
        is_stop_token = finish_reason is FinishReason.STOP
        if not is_stop_token or self._options.include_stop_str_in_output:
            self._push_text(delta, self._detokenizer.push(token.token_id))
        if self._matcher.has_matched:
            delta.stop_reason = self._matcher.matched
            self._finish(delta, FinishReason.STOP)
        elif finish_reason is not None:
            if is_stop_token and token.token_id in self._stop_token_ids:
                delta.stop_reason = token.token_id
            self._finish(delta, finish_reason)

    def _push_text(self, delta: TextDelta, text: str) -> None:
        if self.num_tokens > self._options.min_tokens:
            text = self._matcher.push(text)
        delta.text += text

    def _finish(self, delta: TextDelta, finish_reason: FinishReason) -> None:
        if not self._matcher.has_matched:
            delta.text += self._matcher.push(self._detokenizer.flush())
            delta.text += self._matcher.flush()
        delta.finish_reason = finish_reason
        self._is_finished = True
