"""Prompts into token ids, refusing early what could never fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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

    def encode_chat(
        self,
        messages: Sequence[Message],
        template_args: Mapping[str, Any] | None,
        *,
        add_special_tokens: bool,
    ) -> list[int]:
        """Return the token ids of a conversation, by the adapter's template if it has one.

        Raises:
            ChatTemplateMissing, ChatTemplateFailed, ContextLengthExceeded, InvalidText
        """
        system_prompt = self._defaults.system_prompt
        if system_prompt and not any(message["role"] == "system" for message in messages):
            messages = [{"role": "system", "content": system_prompt}, *messages]
        text = self._vocabulary.render_chat(
            messages, template_args, template=self._defaults.chat_template
        )
        return self.encode(text, add_special_tokens=add_special_tokens)

    def check(self, token_ids: list[int]) -> list[int]:
        """Return the ids of a prompt given as such; raises ContextLengthExceeded, UnknownToken."""
        self._limit.check_prompt(len(token_ids))
        self._vocabulary.check(token_ids, param="prompt")
        return token_ids
