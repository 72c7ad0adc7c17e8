"""Prompts into token ids, refusing early what could never fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loraplex_server.adapters.defaults import AdapterDefaults
from loraplex_server.api.context_limit import ContextLimit
from loraplex_server.text.vocabulary import Message, Vocabulary


@dataclass(frozen=True)
class Truncation:
    """How much of a prompt is kept.

    Attributes:
        num_tokens: at most so many.
        keeps_end: the last ones; else the first.
    """

    num_tokens: int
    keeps_end: bool = True

    def cut(self, token_ids: list[int]) -> list[int]:
        """Return what is kept."""
        return token_ids[-self.num_tokens :] if self.keeps_end else token_ids[: self.num_tokens]


class PromptEncoder:
    """Encodes for one limit and one adapter's defaults; immutable, used from any thread.

    Length is judged before any work that grows with it.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        limit: ContextLimit | None,
        defaults: AdapterDefaults | None = None,
        truncation: Truncation | None = None,
    ) -> None:
        """Encode for an adapter, or the base model.

        Args:
            limit: None refuses no length.
        """
        self._vocabulary = vocabulary
        self._limit = limit
        self._defaults = defaults or AdapterDefaults()
        self._truncation = truncation

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text; raises ContextLengthExceeded, InvalidText."""
        if self._limit is not None and self._truncation is None:
            self._limit.check_prompt(self._vocabulary.least_tokens(text), is_least=True)
        return self._cut(self._vocabulary.encode(text, add_special_tokens=add_special_tokens))

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
        token_ids = self._cut(token_ids)
        if self._limit is not None:
            self._limit.check_prompt(len(token_ids))
        self._vocabulary.check(token_ids, param="prompt")
        return token_ids

    def _cut(self, token_ids: list[int]) -> list[int]:
        return self._truncation.cut(token_ids) if self._truncation else token_ids
