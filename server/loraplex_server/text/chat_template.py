"""A chat template as text: which variables it knows, without running it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
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
        from jinja2 import Environment, TemplateSyntaxError

        try:
            tokens = list(Environment(autoescape=True).lex(self.text))
        except TemplateSyntaxError:
            return frozenset()
        return frozenset(value for _, kind, value in tokens if kind == "name")
