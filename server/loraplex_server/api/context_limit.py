"""How many tokens a request's prompt and answer may have together, and whose limit that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from loraplex_server.adapters.record import AdapterRecord
from loraplex_server.api.errors import ContextLengthExceeded


@dataclass(frozen=True)
class ContextLimit:
    """Immutable.

    Attributes:
        num_tokens: of a prompt and its answer.
        reason: the same as a sentence without its end.
    """

    num_tokens: int
    reason: str

    @classmethod
    def of(cls, max_model_len: int, record: AdapterRecord | None = None) -> Self:
        """Return the limit of the base model's requests, or of an adapter's.

        An adapter's virtual tokens take room that the model's limit counts and nobody sees.
        """
        num_virtual = record.spec.num_virtual_tokens if record else 0
        own = record.defaults.max_context if record else None
        if own is not None and own < max_model_len - num_virtual:
            return cls(own, f"This adapter's maximum context length is {own} tokens")
        reason = f"This model's maximum context length is {max_model_len} tokens"
        if num_virtual:
            reason += f", of which the adapter's virtual tokens take {num_virtual}"
        return cls(max_model_len - num_virtual, reason)

    def check_prompt(self, prompt_len: int, *, is_least: bool = False) -> None:
        """Raise ContextLengthExceeded unless a prompt leaves room for one token of the answer.

        Args:
            prompt_len: tokens.
            is_least: it may be more; nobody has counted.
        """
        if prompt_len < self.num_tokens:
            return
        raise ContextLengthExceeded(
            f"{self.reason}, but the prompt alone has {'at least ' if is_least else ''}"
            f"{prompt_len}; at least one more is needed for the answer.",
            param="prompt",
        )

    def answer_len(self, *, requested: int | None, default: int | None, longest_prompt: int) -> int:
        """Return the most tokens to generate: as requested, or as many as fit up to the default.

        Raises:
            ContextLengthExceeded: the prompt, or the prompt and what was requested, do not fit.
        """
        self.check_prompt(longest_prompt)
        room = self.num_tokens - longest_prompt
        if requested is None:
            return room if default is None else min(default, room)
        if requested > room:
            raise ContextLengthExceeded(
                f"{self.reason}, but {longest_prompt + requested} were requested: "
                f"{longest_prompt} in the prompt and {requested} for the answer.",
                param="max_tokens",
            )
        return requested
