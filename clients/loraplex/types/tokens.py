"""Text as tokens, and tokens as text."""

from __future__ import annotations

from loraplex.types.base import ApiModel


class Tokenized(ApiModel):
    """The answer of POST /tokenize.

    Attributes:
        count: How many tokens there are.
        max_model_len: How many a prompt and its answer may have together.
        tokens: Their ids.
        token_strs: Each as text, where that was asked for.
    """

    count: int
    max_model_len: int | None = None
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(ApiModel):
    """The answer of POST /detokenize."""

    prompt: str
