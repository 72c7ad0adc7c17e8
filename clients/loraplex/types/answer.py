"""What completions, chat completions and their chunks have in common."""

from __future__ import annotations

from abc import abstractmethod

from loraplex.types.base import ApiModel


class PromptTokensDetails(ApiModel):
    """Where the prompt's tokens came from.

    Attributes:
        cached_tokens: Those the server had computed before, for a prompt that began alike.
    """

    cached_tokens: int = 0


class Usage(ApiModel):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that nobody had to compute."""
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else 0


class AnswerTimes(ApiModel):
    """How long the parts of an answer took, as the server measured them; None is not known.

    Queue, adapter load and prefill are those of the sequence that had its first token first.
    """

    time_to_first_token_ms: float | None = None
    queue_time_ms: float | None = None
    adapter_load_ms: float | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None
    mean_itl_ms: float | None = None
    tokens_per_second: float | None = None
    total_time_ms: float | None = None


class Answer(ApiModel):
    """What completions, chat completions and the chunks of both have in common.

    Attributes:
        metrics: How long its parts took; of a stream with the usage.
    """

    id: str
    object: str
    created: int
    model: str
    usage: Usage | None = None
    metrics: AnswerTimes | None = None

    @property
    @abstractmethod
    def text(self) -> str:
        """The text of the first choice (of a chunk: what it adds to the first choice)."""
