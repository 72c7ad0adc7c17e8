"""The answers of POST /v1/completions."""

from __future__ import annotations

from typing import Any

from loraplex.types.answer import Answer
from loraplex.types.base import ApiModel


class CompletionLogprobs(ApiModel):
    """Log-probabilities of a completion: parallel lists with one entry per token."""

    text_offset: list[int] = []
    token_logprobs: list[float | None] = []
    tokens: list[str] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class CompletionChoice(ApiModel):
    """One answer of a completion, or what one chunk adds to it.

    Attributes:
        finish_reason: "stop" or "length"; None while the answer goes on.
        stop_reason: The stop string or stop token id that ended it.
        model: Who answered, where the request named several `models`.
        token_ids: With `return_token_ids`.
        prompt_token_ids: Of the prompt, with `return_token_ids`.
        prompt_logprobs: Of the prompt, with `prompt_logprobs`; one entry per token, the first None.
    """

    index: int
    text: str
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: CompletionLogprobs | None = None
    model: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class Completion(Answer):
    """The answer of POST /v1/completions, and, with partial choices, a chunk of its stream."""

    choices: list[CompletionChoice]

    @property
    def text(self) -> str:
        """The text of the first choice, or what this chunk adds to it."""
        return next((choice.text for choice in self.choices if choice.index == 0), "")


class CompletionChunk(Completion):
    """One event of a completion stream; `usage` comes with the last, which has no choices."""
