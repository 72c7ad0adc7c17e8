"""What an answer is made of once its text was read: content, reasoning, and calls of tools."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text the model wrote to itself, without the marks around it."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of a tool begins; its arguments follow."""

    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next characters of the JSON arguments of the call begun last."""

    text: str


Piece = Content | Reasoning | CallStart | CallArguments


@dataclass(slots=True)
class Call:
    """A call as far as it was written."""

    call_id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class AnswerParts:
    """All pieces of an answer, put together."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, pieces: Iterable[Piece]) -> None:
        """Append the next pieces."""
        for piece in pieces:
            if isinstance(piece, Content):
                self.content += piece.text
            elif isinstance(piece, Reasoning):
                self.reasoning += piece.text
            elif isinstance(piece, CallStart):
                self.calls.append(Call(piece.call_id, piece.name))
            else:
                self.calls[-1].arguments += piece.text
