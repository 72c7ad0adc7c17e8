"""The tokenizer as the server uses it: text to token ids and back.

Invariant: nothing here changes the tokenizer, so one `Vocabulary` serves all threads. A fast
tokenizer is driven through its Rust backend, which is both quicker and free of the clean-ups that
rewrite text already sent.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from loraplex_server.text.chat_template import ChatTemplate
from loraplex_server.text.errors import (
    ChatTemplateFailed,
    ChatTemplateMissing,
    InvalidText,
    UnknownToken,
)

#: Token ids to text, whatever the ids are; incomplete UTF-8 becomes U+FFFD.
Decode = Callable[[Sequence[int]], str]

Message = Mapping[str, Any]

_TOKEN_CACHE: Final = 65536
#: Templates of adapters come and go.
_TEMPLATE_CACHE: Final = 64


def check_text(text: str) -> None:
    """Raise InvalidText unless `text` is Unicode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidText(f"the text has a lone surrogate at {error.start}") from None


@dataclass(frozen=True)
class RenderOptions:
    """What a chat template is told beside the messages.

    Attributes:
        tools: as OpenAI's API describes them.
        documents: for templates that know them.
        adds_generation_prompt: the prompt ends where the assistant's answer begins.
        continues_final_message: the prompt ends inside of the last message.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    documents: Sequence[Mapping[str, Any]] = ()
    adds_generation_prompt: bool = True
    continues_final_message: bool = False


_USUAL: Final = RenderOptions()


class Vocabulary:
    """A Hugging Face tokenizer's encoding, decoding and chat template; immutable, thread-safe."""

    def __init__(self, tokenizer: Any, *, size: int | None = None) -> None:
        """Wrap `tokenizer`, a `PreTrainedTokenizerBase`; it is the wrapper's alone from now on.

        Args:
            size: token ids the model has; the tokenizer may know more or fewer.
        """
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._special_ids = frozenset(int(i) for i in tokenizer.all_special_ids)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            added = self._backend.get_added_tokens_decoder()
            self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._template_args = frozenset(
            inspect.signature(tokenizer.apply_chat_template).parameters
        ) - {"kwargs"}
        self._is_byte_level = type(getattr(self._backend, "decoder", None)).__name__ == "ByteLevel"
        self._size = len(tokenizer) if size is None else size
        self._longest_token = max(map(len, tokenizer.get_vocab()), default=1)
        self.token_bytes = lru_cache(_TOKEN_CACHE)(self._token_bytes)
        self._as_template = lru_cache(_TEMPLATE_CACHE)(ChatTemplate)

    def __len__(self) -> int:
        return self._size

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that `skip_special_tokens` leaves out."""
        return self._special_ids

    @property
    def is_byte_level(self) -> bool:
        """Whether a text is its tokens' bytes, one after the other, and nothing else.

        Then decoding is the same as reading `token_bytes` as UTF-8 with errors replaced.
        """
        return self._is_byte_level

    def to_json(self) -> str | None:
        """Return the tokenizer as the `tokenizers` library writes it; None if it is no such one.

        Takes a tenth of a second.
        """
        return None if self._backend is None else str(self._backend.to_str())

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`; raises InvalidText."""
        check_text(text)
        if self._backend is not None:
            # A batch of one: unlike `encode`, it lets go of the GIL, so that encoding a long text
            # in a thread does not hold up the event loop.
            batch = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
            return list(batch[0].ids)
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def least_tokens(self, text: str) -> int:
        """Return how many tokens `text` has if each is the longest of the vocabulary.

        Costs nothing, and bounds what is worth encoding. Only texts that the tokenizer itself
        shortens (a normaliser that drops characters) could have fewer.
        """
        return -(-len(text) // self._longest_token)

    def check(self, token_ids: Sequence[int], *, param: str) -> None:
        """Raise UnknownToken, naming `param`, unless every id is in the vocabulary."""
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self._size):
            bad = next(i for i in token_ids if not 0 <= i < self._size)
            raise UnknownToken(
                f"token id {bad} is not in the vocabulary of {self._size} tokens", param=param
            )

    def decoder(self, *, skip_special_tokens: bool) -> Decode:
        """Return the function that turns token ids into text."""
        if self._backend is not None:
            decode = self._backend.decode
            return lambda ids: str(decode(ids, skip_special_tokens=skip_special_tokens))
        decode = self._tokenizer.decode
        return lambda ids: str(
            decode(
                ids,
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )

    def chat_template(self, own: str | None = None, *, with_tools: bool = False) -> ChatTemplate:
        """Return the template that a conversation is written with.

        Args:
            own: Jinja of an adapter or a request, instead of the tokenizer's.
            with_tools: choose the one for tools where the tokenizer has several.

        Raises:
            ChatTemplateMissing: there is none.
        """
        text = own if own is not None else getattr(self._tokenizer, "chat_template", None)
        if isinstance(text, dict):
            text = (text.get("tool_use") if with_tools else None) or text.get("default")
        if not text:
            raise ChatTemplateMissing(
                "this model has no chat template; use /v1/completions", param="messages"
            )
        return self._as_template(text)

    def special_token_id(self, text: str) -> int | None:
        """Return the id of the special token that is written so; None if it is none."""
        token_id = self._tokenizer.convert_tokens_to_ids(text)
        # What is no token at all has the id of the unknown one, which may be special.
        is_own = token_id in self._special_ids and self.token_text(token_id) == text
        return token_id if is_own else None

    def render_chat(
        self,
        messages: Sequence[Message],
        template_args: Mapping[str, Any] | None = None,
        *,
        template: str | None = None,
        options: RenderOptions = _USUAL,
    ) -> str:
        """Return the prompt of a conversation, as its template writes it.

        Args:
            template_args: variables of the template.
            template: Jinja, instead of the tokenizer's own.

        Raises:
            ChatTemplateMissing, ChatTemplateFailed: as their names say.
        """
        from jinja2 import TemplateError

        chosen = self.chat_template(template, with_tools=bool(options.tools))
        if chosen.has_powers:
            raise ChatTemplateFailed(
                "the chat template raises to a power (`**`), which may take for ever; write it "
                "without",
                param="messages",
            )
        extra = dict(template_args or {})
        if reserved := sorted(self._template_args & extra.keys()):
            raise ChatTemplateFailed(
                f"chat_template_kwargs may not set {', '.join(reserved)}",
                param="chat_template_kwargs",
            )
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=chosen.text,
                tokenize=False,
                tools=list(options.tools) or None,
                documents=list(options.documents) or None,
                add_generation_prompt=options.adds_generation_prompt,
                continue_final_message=options.continues_final_message,
                **extra,
            )
        except (TemplateError, TypeError, ValueError, KeyError, ArithmeticError) as error:
            raise ChatTemplateFailed(
                f"the chat template refused the messages: {error}", param="messages"
            ) from error
        except (MemoryError, RecursionError) as error:
            raise ChatTemplateFailed(
                f"the chat template wants too much: {error or 'out of memory'}", param="messages"
            ) from error
        return str(rendered)

    def token_text(self, token_id: int) -> str:
        """Return one token as OpenAI's logprobs show it: its text, or `bytes:\\xe2\\x80`."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _token_bytes(self, token_id: int) -> bytes:
        """Return the bytes one token stands for, also when they are no complete text."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):  # ids the model has but the tokenizer does not
            return b""
        if self._is_byte_level:
            if all(char in _BYTE_OF_CHAR for char in token):
                return bytes(_BYTE_OF_CHAR[char] for char in token)
            return token.encode("utf-8")  # one that was added as it is
        if token_id not in self._special_ids:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            if "\u2581" in token:
                return token.replace("\u2581", " ").encode("utf-8")
        return self.decoder(skip_special_tokens=False)([token_id]).encode("utf-8")


def _byte_alphabet() -> dict[str, int]:
    """Return the inverse of GPT-2's map from bytes to printable characters."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    chars = {chr(byte): byte for byte in printable}
    return chars | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHAR: Final[Mapping[str, int]] = _byte_alphabet()
