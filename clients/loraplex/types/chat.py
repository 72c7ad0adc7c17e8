"""The answers of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from loraplex.types.answer import Answer
from loraplex.types.base import ApiModel


class TopLogprob(ApiModel):
    """One token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TopLogprob):
    """One chosen token, with the likeliest others."""

    top_logprobs: list[TopLogprob] = []


class ChatLogprobs(ApiModel):
    """Log-probabilities of a chat answer."""

    content: list[TokenLogprob] | None = None


class FunctionCall(ApiModel):
    """A function to be called; `arguments` is JSON as the model wrote it.

    In a chunk, `arguments` is what it adds to them, and `name` comes with the first.
    """

    name: str | None = None
    arguments: str = ""


class ToolCall(ApiModel):
    """What the model wants to have called. Answer it with a message of the role "tool".

    Attributes:
        id: To be given back as `tool_call_id`; in chunks with the first piece of a call.
        index: Which of the calls a piece belongs to; of chunks only.
    """

    function: FunctionCall
    id: str | None = None
    type: str | None = "function"
    index: int | None = None


class ChatMessage(ApiModel):
    """One turn of a conversation. An answer's message can go back into `messages` as it is."""

    role: str
    content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(ApiModel):
    """One answer of a chat completion.

    Attributes:
        finish_reason: "stop", "length" or "tool_calls".
        stop_reason: The stop string or stop token id that ended it.
        model: Who answered, where the request named several `models`.
        token_ids: With `return_token_ids`.
    """

    index: int
    message: ChatMessage
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: ChatLogprobs | None = None
    model: str | None = None
    token_ids: list[int] | None = None


class ChatCompletion(Answer):
    """The answer of POST /v1/chat/completions.

    Attributes:
        prompt_token_ids: With `return_token_ids`.
        prompt_logprobs: With `prompt_logprobs`; one entry per token of the prompt, the first None.
    """

    choices: list[ChatChoice]
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return next((choice.message.content or "" for choice in self.choices), "")

    @property
    def tool_calls(self) -> list[ToolCall]:
        """What the first choice wants to have called."""
        return next((choice.message.tool_calls or [] for choice in self.choices), [])


class ChatDelta(ApiModel):
    """What one chunk adds to a message; `role` comes with the first."""

    role: str | None = None
    content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChunkChoice(ApiModel):
    """What one chunk adds to one answer."""

    index: int
    delta: ChatDelta
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: ChatLogprobs | None = None
    model: str | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(Answer):
    """One event of a chat stream; `usage` comes with the last, which has no choices."""

    choices: list[ChatChunkChoice]

    @property
    def text(self) -> str:
        """What this chunk adds to the text of the first choice."""
        return next((c.delta.content or "" for c in self.choices if c.index == 0), "")
