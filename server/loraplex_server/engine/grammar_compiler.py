"""Compiling grammars beside the steps: in a thread of its own, into matchers.

llguidance is imported, and the vocabulary laid out for it, when the first grammar comes; an engine
that gets none needs neither. The tokenizer comes from whoever has one already, as text: reading it
from a GGUF file takes seconds of Python, which the steps would feel. Matchers of equal grammars
share what was compiled.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

from loraplex_server.background import start_background_thread

log = logging.getLogger(__name__)

#: Grammars kept compiled; one of a large schema takes some 100 kB.
_MAX_KEPT: Final = 64

_NOT_INSTALLED: Final = (
    "this server cannot constrain answers: the package `llguidance` is not installed"
)
_NO_TOKENIZER: Final = "this engine was told no tokenizer that grammars could be compiled for"


class TokenTable:
    """The vocabulary as llguidance reads it; immutable."""

    def __init__(self, tokenizer: str, num_tokens: int, end_ids: Collection[int]) -> None:
        """Build the table, which takes tenths of a second.

        Args:
            tokenizer: JSON, as the `tokenizers` library writes it.
            num_tokens: ids the model has.
            end_ids: tokens that end an answer; the tokenizer's own if the model names none.

        Raises:
            ImportError: llguidance is not installed.
            ValueError: it is no such tokenizer, or does not fit.
        """
        from llguidance import LLTokenizer

        ends = sorted(end_ids) or None
        self._table = LLTokenizer(tokenizer, n_vocab=num_tokens, eos_token=ends)

    def matcher(self, grammar: str) -> Any:
        """Return a new `LLMatcher`, at the beginning; it may be in error."""
        from llguidance import LLMatcher, LLParserLimits

        # Messages go to whoever sent the grammar: without the state of the parser.
        limits = LLParserLimits(verbose_errors=False)
        return LLMatcher(self._table, grammar, log_level=0, limits=limits)


@dataclass(frozen=True)
class CompiledGrammar:
    """What became of one request's grammar; `matcher` is its alone, None with an `error`."""

    request_id: str
    matcher: Any
    error: str | None = None


class GrammarCompiler:
    """Used from the engine's thread; owns the thread that compiles, once it is needed.

    Args:
        num_tokens: ids the model has.
        end_ids: tokens that end an answer.
        wake: called by that thread after each grammar.
    """

    def __init__(self, num_tokens: int, end_ids: Collection[int], wake: Callable[[], None]) -> None:
        self.num_tokens = num_tokens
        self._end_ids = end_ids
        self._wake = wake
        self._tokenizer: str | None = None
        self._table: TokenTable | None = None
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._wishes: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[CompiledGrammar] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def learn_tokens(self, tokenizer: str) -> None:
        """Take this tokenizer, JSON of the `tokenizers` library, for all grammars from now on."""
        self._tokenizer = tokenizer

    def begin(self, request_id: str, grammar: str) -> None:
        """Compile a grammar, after those that were asked for before."""
        if self._thread is None:
            self._thread = start_background_thread("grammars", self._run)
        self._wishes.put((request_id, grammar))

    def poll(self, timeout_s: float = 0.0) -> list[CompiledGrammar]:
        """Return what is done; wait up to `timeout_s` for the first one."""
        done: list[CompiledGrammar] = []
        try:
            done.append(self._done.get(block=timeout_s > 0, timeout=timeout_s or None))
            while True:
                done.append(self._done.get_nowait())
        except queue.Empty:
            return done

    def close(self) -> None:
        """Have the thread end; it may still compile one grammar."""
        self._wishes.put(None)

    def _run(self) -> None:
        while (wish := self._wishes.get()) is not None:
            self._done.put(self._compiled(*wish))
            self._wake()

    def _compiled(self, request_id: str, grammar: str) -> CompiledGrammar:
        if self._tokenizer is None:
            return CompiledGrammar(request_id, None, _NO_TOKENIZER)
        try:
            matcher = self._matcher(grammar, self._tokenizer)
        except ImportError:
            return CompiledGrammar(request_id, None, _NOT_INSTALLED)
        except Exception as error:  # the thread's top frame: whatever it is, only this one fails
            log.exception("a grammar could not be compiled")
            return CompiledGrammar(request_id, None, f"the grammar cannot be served: {error}")
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())[:500]
            return CompiledGrammar(request_id, None, f"the grammar cannot be served: {reason}")
        return CompiledGrammar(request_id, matcher)

    def _matcher(self, grammar: str, tokenizer: str) -> Any:
        if self._table is None:
            self._table = TokenTable(tokenizer, self.num_tokens, self._end_ids)
        kept = self._kept.pop(grammar, None)
        if kept is None:
            kept = self._table.matcher(grammar)
            if kept.is_error():
                return kept
        self._kept[grammar] = kept
        if len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)
        return kept.deep_copy()
