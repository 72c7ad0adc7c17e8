"""How one request wants its tokens chosen; checked once, at the door."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from loraplex_scheduler.errors import InvalidSampling


@dataclass(frozen=True)
class SamplingParams:
    """Immutable; invalid combinations raise `InvalidSampling` on construction.

    Attributes:
        max_tokens: most tokens to generate, at least 1.
        temperature: 0 is greedy.
        top_k: 0 is off.
        seed: 64-bit; with the token's position it fixes every random draw. The caller chooses one
            when the user gave none, and gives each of `n` samples its own.
        stop_token_ids: end the sequence, in addition to the model's end tokens.
        ignore_eos: the model's end tokens do not end the sequence (stop_token_ids still do).
        min_tokens: until so many are generated, end and stop tokens are never chosen.
        logprobs: report the chosen token's log probability and those of so many of the likeliest;
            None reports nothing.
        prompt_logprobs: the same for each token of the prompt but the first; then the whole prompt
            is computed, whatever the prefix cache holds of it.
        allowed_token_ids: no other token is ever chosen; None allows all.
        bad_words: token sequences that are never completed, by their last token.
        grammar: what the answer must be, as `loraplex_server.text.grammars` writes it; None is
            anything. The answer ends where the grammar must, so end tokens cannot be ignored.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: frozenset[int] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: str | None = None

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        _check("temperature", self.temperature, 0 <= self.temperature <= 100, "between 0 and 100")
        _check("top_k", self.top_k, self.top_k >= 0, "at least 1, or 0 for off")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1")
        _check(
            "repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0"
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(name, value, -2 <= value <= 2, "between -2 and 2")
        _check("min_tokens", self.min_tokens, self.min_tokens >= 0, "at least 0")
        _check("min_tokens", self.min_tokens, self.min_tokens <= self.max_tokens, "<= max_tokens")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            _check(name, count, 0 <= (count or 0) <= 20, "between 0 and 20")
        has_choice = self.allowed_token_ids is None or len(self.allowed_token_ids) > 0
        _check("allowed_token_ids", 0, has_choice, "at least one token")
        has_words = all(self.bad_words)
        _check("bad_words", 0, has_words, "sequences of at least one token")
        if self.grammar is not None and self.ignore_eos:
            reason = "ignore_eos and a grammar exclude each other: the answer ends where it must"
            raise InvalidSampling(param="ignore_eos", reason=reason)
        for bias in self.logit_bias.values():
            _check("logit_bias", bias, -100 <= bias <= 100, "between -100 and 100")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """The next token depends on the ids of those before, not on their KV alone."""
        return self.has_penalties or bool(self.bad_words) or self.grammar is not None

    @property
    def restricts_tokens(self) -> bool:
        """Some tokens may be out of the question, whatever the model thinks of them."""
        return bool(
            self.bad_words or self.allowed_token_ids is not None or self.grammar is not None
        )

    @property
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


def _check(name: str, value: float | None, is_valid: bool, expected: str) -> None:
    if not is_valid or (value is not None and not math.isfinite(value)):
        raise InvalidSampling(param=name, reason=f"{name} must be {expected}, not {value}")
