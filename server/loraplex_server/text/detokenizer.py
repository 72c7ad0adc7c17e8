"""Token ids of one sequence, one by one, into text that can be sent at once.

A token's text depends on its neighbours: a character may span tokens, and some tokenizers drop a
leading space. So a short window of tokens is decoded again and only what came after the text
already sent is new (the prefix-offset method of TGI and vLLM).

    window   [anchor tokens | pending tokens]     decode(window) = settled text + new text

Where a token's text is no more than its bytes, these are decoded instead, each once.

Invariant: the concatenation of everything returned, `flush` included, is the decoding of all
tokens at once; U+FFFD is returned only for bytes that no later token can complete.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable, Collection, Sequence
from typing import Final, Protocol

from loraplex_server.text.vocabulary import Decode, Vocabulary

#: Tokens of the prompt that the first new token is decoded after.
_PROMPT_ANCHOR: Final = 6
#: More pending tokens than any character has bytes: what is then still incomplete is invalid.
_MAX_PENDING: Final = 8
_REPLACEMENT: Final = "\ufffd"


class Detokenizer(Protocol):
    """Incremental decoding of one sequence; owned by whoever reads that sequence's events."""

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes; empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """Return what is left at the end of the sequence; incomplete bytes show as U+FFFD."""
        ...


def make_detokenizer(
    vocabulary: Vocabulary, *, skip_special_tokens: bool, prompt_ids: Sequence[int]
) -> Detokenizer:
    """Return the quickest detokenizer for a vocabulary; `prompt_ids` as in `WindowDetokenizer`."""
    skipped_ids = vocabulary.special_ids if skip_special_tokens else frozenset[int]()
    if vocabulary.is_byte_level:
        return ByteDetokenizer(
            vocabulary.token_bytes, skipped_ids=skipped_ids, prompt_ids=prompt_ids
        )
    return WindowDetokenizer(
        vocabulary.decoder(skip_special_tokens=skip_special_tokens),
        skipped_ids=skipped_ids,
        prompt_ids=prompt_ids,
    )


class ByteDetokenizer:
    """Implements `Detokenizer` for byte-level vocabularies, at a tenth of the cost per token."""

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        *,
        skipped_ids: Collection[int] = (),
        prompt_ids: Sequence[int] = (),
    ) -> None:
        """Start after `prompt_ids`, whose own text is not returned."""
        self._token_bytes = token_bytes
        self._skipped_ids = skipped_ids
        self._pending = b""
        for token_id in _tail(prompt_ids, skipped_ids):
            self._decode(token_id)
        # A character that the prompt leaves incomplete is the prompt's, whatever becomes of it.
        self._is_prompts = bool(self._pending)

    def push(self, token_id: int) -> str:
        """See `Detokenizer`."""
        if token_id in self._skipped_ids:
            return ""
        text = self._decode(token_id)
        return self._without_prompts(text) if self._is_prompts else text

    def flush(self) -> str:
        """See `Detokenizer`."""
        text = self._pending.decode("utf-8", "replace")
        self._pending = b""
        return self._without_prompts(text) if self._is_prompts else text

    def _decode(self, token_id: int) -> str:
        raw = self._pending + self._token_bytes(token_id)
        text, num_read = utf_8_decode(raw, "replace", False)
        self._pending = raw[num_read:]
        return text

    def _without_prompts(self, text: str) -> str:
        self._is_prompts = not text
        return text[1:]


class WindowDetokenizer:
    """Implements `Detokenizer` for any vocabulary."""

    def __init__(
        self, decode: Decode, *, skipped_ids: Collection[int] = (), prompt_ids: Sequence[int] = ()
    ) -> None:
        """Start after `prompt_ids`, whose own text is not returned.

        Args:
            decode: see `Vocabulary.decoder`.
            skipped_ids: tokens without text, left out so that they never part a character.
        """
        self._decode = decode
        self._skipped_ids = skipped_ids
        self._window = _tail(prompt_ids, skipped_ids)
        self._settled_len = len(decode(self._window)) if self._window else 0
        self._num_anchor = len(self._window)

    def push(self, token_id: int) -> str:
        """See `Detokenizer`."""
        if token_id in self._skipped_ids:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT):
            if len(self._window) - self._num_anchor <= _MAX_PENDING:
                return ""
            return self._give_up_on_invalid(text)
        new = text[self._settled_len :]
        self._slide(self._num_anchor)
        return new

    def flush(self) -> str:
        """See `Detokenizer`."""
        if len(self._window) == self._num_anchor:
            return ""
        text = self._decode(self._window)
        new = text[self._settled_len :]
        self._slide(self._num_anchor)
        return new

    def _slide(self, num_dropped: int) -> None:
        """Make the tokens pending until now the anchor of the next ones."""
        del self._window[:num_dropped]
        self._num_anchor = len(self._window)
        self._settled_len = len(self._decode(self._window))

    def _give_up_on_invalid(self, text: str) -> str:
        """Settle everything but the last character, which may still become complete.

        The new anchor has at least as many bytes as any incomplete character.
        """
        new = text[self._settled_len : -1]
        self._window = self._window[-_MAX_PENDING // 2 :]
        self._num_anchor = len(self._window)
        self._settled_len = max(0, len(self._decode(self._window)) - 1)
        return new


def _tail(prompt_ids: Sequence[int], skipped_ids: Collection[int]) -> list[int]:
    """Return the last tokens of the prompt that have text."""
    tail = [i for i in prompt_ids[-4 * _PROMPT_ANCHOR :] if i not in skipped_ids]
    return tail[-_PROMPT_ANCHOR:]
