"""Log probabilities in the shapes that OpenAI and vLLM gave them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

from loraplex_scheduler.plan import SampledToken, TokenLogprobs
from loraplex_server.text.vocabulary import Vocabulary

#: Stands for minus infinity, which JSON cannot write (as in vLLM), and for what is no number.
_LEAST: Final = -9999.0


def shown_logprob(logprob: float) -> float:
    """Return a log probability as JSON can write it."""
    return max(logprob, _LEAST) if math.isfinite(logprob) else _LEAST


def token_name(vocabulary: Vocabulary, token_id: int, *, as_id: bool) -> str:
    """Return what a token is called: its text, or with vLLM's `return_tokens_as_token_ids` its id.

    Unlike texts, ids tell all tokens apart.
    """
    return f"token_id:{token_id}" if as_id else vocabulary.token_text(token_id)


def chat_logprobs(
    vocabulary: Vocabulary, tokens: Iterable[SampledToken], *, as_ids: bool = False
) -> dict[str, Any]:
    """Return the `logprobs` object of a chat choice."""
    content = []
    for token in tokens:
        assert token.logprobs is not None, "the engine reports what the sampling asked for"
        entry = _chat_entry(vocabulary, token.token_id, token.logprobs.logprob, as_ids)
        entry["top_logprobs"] = [
            _chat_entry(vocabulary, token_id, logprob, as_ids)
            for token_id, logprob in token.logprobs.top
        ]
        content.append(entry)
    return {"content": content, "refusal": None}


def _chat_entry(
    vocabulary: Vocabulary, token_id: int, logprob: float, as_id: bool
) -> dict[str, Any]:
    return {
        "token": token_name(vocabulary, token_id, as_id=as_id),
        "logprob": shown_logprob(logprob),
        "bytes": list(vocabulary.token_bytes(token_id)),
    }


def prompt_logprobs(
    vocabulary: Vocabulary, prompt: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> list[dict[str, Any] | None]:
    """Return vLLM's `prompt_logprobs`: by token id, of each token of the prompt and its rivals.

    Args:
        logprobs: of each token but the first, which nothing precedes: null.
    """
    shown: list[dict[str, Any] | None] = [None]
    for token_id, entry in zip(prompt[1:], logprobs, strict=True):
        ranks = {rival: rank for rank, (rival, _) in enumerate(entry.top, start=1)}
        likely = {**dict(entry.top), token_id: entry.logprob}
        shown.append(
            {
                str(i): {
                    "logprob": shown_logprob(logprob),
                    "rank": ranks.get(i),  # nobody counted those beyond the likeliest
                    "decoded_token": vocabulary.token_text(i),
                }
                for i, logprob in likely.items()
            }
        )
    return shown


class CompletionLogprobs:
    """The `logprobs` objects of one completion choice, whose text offsets go on from one to the
    next."""

    def __init__(
        self, vocabulary: Vocabulary, *, skip_special_tokens: bool, as_ids: bool = False
    ) -> None:
        self._vocabulary = vocabulary
        self._textless = vocabulary.special_ids if skip_special_tokens else frozenset()
        self._as_ids = as_ids
        self._offset = 0

    def write(self, tokens: Iterable[SampledToken]) -> dict[str, Any]:
        """Return the object for the next tokens; a token without log probabilities has null."""
        shown, logprobs, tops, offsets = [], [], [], []
        for token in tokens:
            name = self._name(token.token_id)
            shown.append(name)
            logprobs.append(shown_logprob(token.logprobs.logprob) if token.logprobs else None)
            tops.append(self._top(name, token.logprobs) if token.logprobs else None)
            offsets.append(self._offset)
            self._offset += self._num_chars(token.token_id)
        return {
            "tokens": shown,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _top(self, name: str, logprobs: TokenLogprobs) -> dict[str, float]:
        top = {self._name(i): shown_logprob(value) for i, value in logprobs.top}
        return {**top, name: shown_logprob(logprobs.logprob)}

    def _name(self, token_id: int) -> str:
        return token_name(self._vocabulary, token_id, as_id=self._as_ids)

    def _num_chars(self, token_id: int) -> int:
        """Count the characters that begin in this token."""
        if token_id in self._textless:
            return 0
        return sum(byte & 0xC0 != 0x80 for byte in self._vocabulary.token_bytes(token_id))


def prompt_tokens(prompt: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> list[SampledToken]:
    """Return a prompt as if it had been sampled, for `echo`; nothing is known of the first."""
    of_rest = map(SampledToken, prompt[1:], logprobs)
    return [SampledToken(prompt[0]), *of_rest]
