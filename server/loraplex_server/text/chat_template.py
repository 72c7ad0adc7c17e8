"""A chat template as text: which variables it knows, without running it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Final

from loraplex_server.text.reasoning import CLOSING, OPENING

_MESSAGE_NAME: Final = re.compile(r"""message(\.name\b|\[['"]name['"]\])""")


@dataclass(frozen=True)
class ChatTemplate:
    """One template; immutable."""

    text: str

    def knows(self, variable: str) -> bool:
        """Whether the template's program names the variable; comments and output do not count."""
        return variable in self._names

    @cached_property
    def has_powers(self) -> bool:
        """Whether the program raises to a power: a single step that may take years.

        Nothing ends such a step, and it holds the interpreter's lock: all of the server would wait.
        """
        tokens = [(kind, value) for kind, value in self._tokens if kind != "whitespace"]
        pairs = pairwise(tokens)
        # Behind a bracket or a comma, the same sign hands arguments on.
        return any(
            token == ("operator", "**") and before not in ("(", ",") for (_, before), token in pairs
        )

    @property
    def knows_names(self) -> bool:
        """Whether the `name` of a message is shown to the model."""
        return _MESSAGE_NAME.search(self.text) is not None

    @property
    def has_reasoning(self) -> bool:
        """Whether the model marks its reasoning in its answers."""
        return OPENING in self.text or CLOSING in self.text

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(value for kind, value in self._tokens if kind == "name")

    @cached_property
    def _tokens(self) -> tuple[tuple[str, str], ...]:
        """Kind and text of what the program is written with; nothing if it is none, and fails."""
        from jinja2 import Environment, TemplateSyntaxError

        try:
            tokens = Environment(autoescape=True).lex(self.text)
            return tuple((kind, value) for _, kind, value in tokens)
        except TemplateSyntaxError:
            return ()
