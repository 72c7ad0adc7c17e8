"""One conversation with the server: its turns, and how fast it was answered."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

from loraplex.client import Client
from loraplex.options import ChatOptions
from loraplex.types import ChatCompletionChunk


@dataclass
class Timing:
    """What one answer took.

    Attributes:
        num_tokens: As the server counted; pieces received when the answer was stopped before that.
        first_s: Seconds to the first piece of text.
        rest_s: Seconds from the first piece to the last.
        finish_reason: The server's, or None when the answer was stopped here.
    """

    num_tokens: int = 0
    first_s: float = 0.0
    rest_s: float = 0.0
    finish_reason: str | None = None

    def __str__(self) -> str:
        words = [f"{self.num_tokens} token{'' if self.num_tokens == 1 else 's'}"]
        if self.num_tokens > 1 and self.rest_s > 0:
            words.append(f"{(self.num_tokens - 1) / self.rest_s:.1f} tokens/s")
        if self.num_tokens:
            words.append(f"first after {self.first_s:.2f} s")
        notes = {"length": "cut off at the token limit", None: "stopped"}
        if self.finish_reason in notes:
            words.append(notes[self.finish_reason])
        return ", ".join(words)


class Conversation:
    """The turns so far, and the model that answers next. Owned by one terminal.

    The turns always alternate: a question that got no answer at all is forgotten, an answer that
    was stopped is kept as far as it came.
    """

    def __init__(
        self,
        client: Client,
        model: str,
        *,
        system: str | None = None,
        options: ChatOptions | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model = model
        self._client = client
        self._options: ChatOptions = {**(options or {}), "stream_options": {"include_usage": True}}
        self._start = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []
        self._clock = clock

    def reset(self) -> None:
        """Forget every turn; the system prompt stays."""
        self._turns.clear()

    def ask(self, question: str, write: Callable[[str], None]) -> Timing:
        """Answer a question, writing each piece as it comes; Ctrl-C stops the answer.

        Raises:
            LoraplexError: There was no answer, or it broke off.
        """
        turns = [*self._turns, {"role": "user", "content": question}]
        pieces: list[str] = []
        timing = Timing()
        try:
            with closing(self._pieces(turns, timing)) as stream:
                for piece in stream:
                    pieces.append(piece)
                    write(piece)
        except KeyboardInterrupt:
            timing.finish_reason = None
        finally:
            if pieces:
                self._turns = [*turns, {"role": "assistant", "content": "".join(pieces)}]
        return timing

    def _pieces(self, turns: list[dict[str, str]], timing: Timing) -> Generator[str, None, None]:
        started = self._clock()
        with self._client.chat.create(
            model=self.model, messages=[*self._start, *turns], stream=True, **self._options
        ) as stream:
            for chunk in stream:
                self._time(chunk, timing, started)
                if chunk.text:
                    yield chunk.text

    def _time(self, chunk: ChatCompletionChunk, timing: Timing, started: float) -> None:
        if chunk.text:
            elapsed_s = self._clock() - started
            timing.first_s = timing.first_s if timing.num_tokens else elapsed_s
            timing.rest_s = elapsed_s - timing.first_s
            timing.num_tokens += 1
        for choice in chunk.choices:
            timing.finish_reason = choice.finish_reason or timing.finish_reason
        if chunk.usage:
            timing.num_tokens = chunk.usage.completion_tokens
