"""Log probabilities in the two shapes that OpenAI gave them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final

from loraplex_scheduler.plan import SampledToken
from loraplex_server.text.vocabulary import Vocabulary

#: Stands for minus infinity, which JSON cannot write (as in vLLM), and for what is no number.
_LEAST: Final = -9999.0


def shown_logprob(logprob: float) -> float:
    """Return a log probability as JSON can write it."""
    return max(logprob, _LEAST) if math.isfinite(logprob) else _LEAST


def chat_logprobs(vocabulary: Vocabulary, tokens: Iterable[SampledToken]) -> dict[str, Any]:
    """Return the `logprobs` object of a chat choice."""
    content = []
    for token in tokens:
        assert token.logprobs is not None, "the engine reports what the sampling asked for"
        entry = _chat_entry(vocabulary, token.token_id, token.logprobs.logprob)
        entry["top_logprobs"] = [
            _chat_entry(vocabulary, token_id, logprob) for token_id, logprob in token.logprobs.top
        ]
        content.append(entry)
    return {"content": content, "refusal": None}


def _chat_entry(vocabulary: Vocabulary, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": vocabulary.token_text(token_id),
        "logprob": shown_logprob(logprob),
        "bytes": list(vocabulary.token_bytes(token_id)),
    }


class CompletionLogprobs:
    """The `logprobs` objects of one completion choice, whose text offsets go on from one to the
    next."""

    def __init__(self, vocabulary: Vocabulary, *, skip_special_tokens: bool) -> None:
        self._vocabulary = vocabulary
        self._textless = vocabulary.special_ids if skip_special_tokens else frozenset()
        self._offset = 0

    def write(self, tokens: Iterable[SampledToken]) -> dict[str, Any]:
        """Return the object for the next tokens."""
        vocabulary = self._vocabulary
        shown, logprobs, tops, offsets = [], [], [], []
        for token in tokens:
            assert token.logprobs is not None, "the engine reports what the sampling asked for"
            name, logprob = vocabulary.token_text(token.token_id), token.logprobs.logprob
            top = {
                vocabulary.token_text(i): shown_logprob(value) for i, value in token.logprobs.top
            }
            shown.append(name)
            logprobs.append(shown_logprob(logprob))
            tops.append({**top, name: shown_logprob(logprob)})
            offsets.append(self._offset)
            self._offset += self._num_chars(token.token_id)
        return {
            "tokens": shown,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _num_chars(self, token_id: int) -> int:
        """Count the characters that begin in this token."""
        if token_id in self._textless:
            return 0
        return sum(byte & 0xC0 != 0x80 for byte in self._vocabulary.token_bytes(token_id))
