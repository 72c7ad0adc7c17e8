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


class Answer(ApiModel):
    """What completions, chat completions and the chunks of both have in common."""

    id: str
    object: str
    created: int
    model: str
    usage: Usage | None = None

    @property
    @abstractmethod
    def text(self) -> str:
        """The text of the first choice (of a chunk: what it adds to the first choice)."""
