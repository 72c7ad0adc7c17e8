"""Prompts into token ids, refusing early what could never fit."""

from __future__ import annotations

from collections.abc import Sequence

from loraplex_server.adapters.defaults import AdapterDefaults
from loraplex_server.api.context_limit import ContextLimit
from loraplex_server.text.vocabulary import Message, Vocabulary


class PromptEncoder:
    """Encodes for one limit and one adapter's defaults; immutable, used from any thread.

    Length is judged before any work that grows with it.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        limit: ContextLimit,
        defaults: AdapterDefaults | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._limit = limit
        self._defaults = defaults or AdapterDefaults()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text; raises ContextLengthExceeded, InvalidText."""
        self._limit.check_prompt(self._vocabulary.least_tokens(text), is_least=True)
        return self._vocabulary.encode(text, add_special_tokens=add_special_tokens)

    @property
    def own_template(self) -> str | None:
        """The adapter's chat template, if it has one."""
        return self._defaults.chat_template

    def with_system_prompt(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return a conversation that begins with the adapter's system prompt, or its own."""
        system_prompt = self._defaults.system_prompt
        if not system_prompt or any(message["role"] == "system" for message in messages):
            return messages
        return [{"role": "system", "content": system_prompt}, *messages]

    def check(self, token_ids: list[int]) -> list[int]:
        """Return the ids of a prompt given as such; raises ContextLengthExceeded, UnknownToken."""
        self._limit.check_prompt(len(token_ids))
        self._vocabulary.check(token_ids, param="prompt")
        return token_ids
