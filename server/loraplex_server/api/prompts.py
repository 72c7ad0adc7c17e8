"""Prompts into token ids, refusing early what could never fit."""

from __future__ import annotations

from loraplex_server.api.sampling import check_prompt_len
from loraplex_server.text.vocabulary import Vocabulary


class PromptEncoder:
    """Encodes for one context length; immutable, used from any thread.

    Length is judged before any work that grows with it.
    """

    def __init__(self, vocabulary: Vocabulary, max_model_len: int) -> None:
        self._vocabulary = vocabulary
        self._max_model_len = max_model_len

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text; raises ContextLengthExceeded, InvalidText."""
        least = self._vocabulary.least_tokens(text)
        check_prompt_len(least, self._max_model_len, is_least=True)
        return self._vocabulary.encode(text, add_special_tokens=add_special_tokens)

    def check(self, token_ids: list[int]) -> list[int]:
        """Return the ids of a prompt given as such; raises ContextLengthExceeded, UnknownToken."""
        check_prompt_len(len(token_ids), self._max_model_len)
        self._vocabulary.check(token_ids, param="prompt")
        return token_ids
