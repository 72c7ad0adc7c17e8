"""Errors of the text package.

TextError
├── ChatTemplateMissing   the model has no chat template
├── ChatTemplateFailed    the template refused the messages or its arguments
├── InvalidGrammar        a grammar, schema, pattern or choice cannot be enforced
├── InvalidText           a text is not Unicode (it has lone surrogates)
└── UnknownToken          a token id lies outside the vocabulary
"""

from __future__ import annotations


class TextError(Exception):
    """Base of everything this package raises on purpose; `param` names the offending field."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        self.param = param
        super().__init__(message)


class ChatTemplateMissing(TextError):
    """The model's tokenizer defines no chat template, so chat requests cannot be rendered."""


class ChatTemplateFailed(TextError):
    """The chat template raised an error for these messages or arguments."""


class InvalidGrammar(TextError):
    """What an answer should follow is not a grammar, is too large, or cannot be enforced."""


class InvalidText(TextError):
    """A text is not Unicode: JSON can write half of a surrogate pair, no tokenizer can read it."""


class UnknownToken(TextError):
    """A token id is negative or not below the size of the vocabulary."""
