"""The grammars that running answers must follow: who waits for one, and what may come next.

A matcher's state follows from the tokens of the answer, which the scheduler owns. So giving way
and recomputing change nothing here, and a mask is the same in any company.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from loraplex_scheduler.plan import EndEvent, Event, FinishReason, Request, SequenceStep
from loraplex_server.engine.grammar_compiler import GrammarCompiler
from loraplex_server.model.errors import NoTokenLeft
from loraplex_server.model.token_masks import Mask

_TOO_LATE: Final = "the grammar of the answer was not compiled before the deadline"


@dataclass
class _Followed:
    """A matcher, and the tokens of the answer that it has seen."""

    matcher: Any
    seen: tuple[int, ...] = ()


@dataclass
class Constraints:
    """Implements `GrammarMasks`; owned by the engine's thread.

    A request with a grammar waits here until it is compiled, as one waits for a load, and is known
    from then on until it has ended.
    """

    compiler: GrammarCompiler
    _waiting: dict[str, Request] = field(default_factory=dict)
    _followed: dict[str, _Followed] = field(default_factory=dict)

    @property
    def num_waiting(self) -> int:
        """Requests whose grammars are being compiled."""
        return len(self._waiting)

    def knows(self, request_id: str) -> bool:
        """Whether a request waits here or follows a grammar."""
        return request_id in self._waiting or request_id in self._followed

    def begin(self, request: Request) -> None:
        """Let a request wait for its grammar."""
        assert request.sampling.grammar is not None, "it waits for nothing"
        self._waiting[request.request_id] = request
        self.compiler.begin(request.request_id, request.sampling.grammar)

    def poll(self, timeout_s: float = 0.0) -> tuple[list[Request], list[Event]]:
        """Return the requests that may be served from now on, and the ends of the others.

        Args:
            timeout_s: how long to wait for the first one.
        """
        ready: list[Request] = []
        events: list[Event] = []
        for done in self.compiler.poll(timeout_s):
            request = self._waiting.pop(done.request_id, None)
            if request is None:
                continue  # it was cancelled
            if done.error is not None:
                events.append(EndEvent(done.request_id, FinishReason.REFUSED, done.error))
            else:
                self._followed[done.request_id] = _Followed(done.matcher)
                ready.append(request)
        return ready, events

    def expire(self, now: float) -> list[Event]:
        """End every waiting request whose deadline has passed."""
        late = [
            request_id
            for request_id, request in self._waiting.items()
            if request.deadline_s is not None and request.deadline_s <= now
        ]
        for request_id in late:
            del self._waiting[request_id]
        return [EndEvent(request_id, FinishReason.TIMED_OUT, _TOO_LATE) for request_id in late]

    def forget(self, request_id: str) -> bool:
        """The request ended; return whether it had waited here."""
        self._followed.pop(request_id, None)
        return self._waiting.pop(request_id, None) is not None

    def allowed(self, step: SequenceStep) -> Mask:
        """See `GrammarMasks`."""
        followed = self._followed[step.request_id]
        self._catch_up(followed, step.history[step.num_prompt_text :])
        matcher = followed.matcher
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if matcher.is_error():
            raise NoTokenLeft(_reason(matcher))
        num_tokens = self.compiler.num_tokens
        return np.unpackbits(bits, count=num_tokens, bitorder="little").view(np.bool_)

    def close(self) -> None:
        """End the compiler's thread."""
        self.compiler.close()

    def _catch_up(self, followed: _Followed, answer: tuple[int, ...]) -> None:
        seen = len(followed.seen)
        if answer[:seen] != followed.seen:
            followed.matcher.reset()
            seen = 0
        if len(answer) > seen and not followed.matcher.consume_tokens(list(answer[seen:])):
            raise NoTokenLeft(_reason(followed.matcher))
        followed.seen = answer


def _reason(matcher: Any) -> str:
    reason = " ".join(matcher.get_error().split())[:500]
    return f"the grammar of the answer cannot be followed any further: {reason}"
