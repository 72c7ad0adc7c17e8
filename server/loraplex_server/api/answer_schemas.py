"""What generation endpoints answer, for the OpenAPI document.

Answers are written as bytes, token by token, not through these models; a test holds every answer
that the document's own examples get against them. Fields may be added to answers.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class CachedTokens(BaseModel):
    """A part of `Usage`."""

    cached_tokens: int = Field(ge=0, description="found in the prefix cache")


class UsageAnswer(BaseModel):
    """How many tokens an answer cost."""

    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    total_tokens: int = Field(ge=0)
    prompt_tokens_details: CachedTokens


#: Milliseconds and rates, by name; null where there is nothing to measure.
Timings = dict[str, float | None]


class CompletionLogprobsAnswer(BaseModel):
    """Four columns over the tokens."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One sample of one prompt."""

    index: int = Field(ge=0)
    text: str
    logprobs: CompletionLogprobsAnswer | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = Field(description="stop string or token, unless the model's")


class CompletionAnswer(BaseModel):
    """An answer that is not streamed."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageAnswer
    metrics: Timings


class TopLogprob(BaseModel):
    """One token that could have been."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    """One token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobsAnswer(BaseModel):
    """Of one choice."""

    content: list[ChatLogprob] | None
    refusal: None = None


class AssistantMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None = None


class ChatChoice(BaseModel):
    """One sample."""

    index: int = Field(ge=0)
    message: AssistantMessage
    logprobs: ChatLogprobsAnswer | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None = Field(description="stop string or token, unless the model's")


class ChatAnswer(BaseModel):
    """An answer that is not streamed."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer
    metrics: Timings


class LoraxToken(BaseModel):
    """One token of an answer."""

    id: int
    text: str
    logprob: float
    special: bool


class LoraxDetails(BaseModel):
    """With `details` only."""

    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    prompt_tokens: int
    generated_tokens: int
    seed: int | None
    prefill: list[LoraxToken] = Field(default_factory=list)
    tokens: list[LoraxToken] = Field(default_factory=list)


class LoraxAnswer(BaseModel):
    """Of `/generate`."""

    generated_text: str
    details: LoraxDetails | None = None
