"""Beginning conversations, as the settings allow."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_server.api.chat_schemas import ChatBody
from loraplex_server.api.dialogue import Dialogue
from loraplex_server.api.front import Front


@dataclass(frozen=True)
class Dialogues:
    """Shared by the endpoints that take conversations; immutable.

    Attributes:
        tool_parser: how calls of tools are written, see `text.tool_format`.
        trusts_templates: requests may bring a chat template.
    """

    front: Front
    tool_parser: str = "auto"
    trusts_templates: bool = False

    def begin(self, body: ChatBody) -> Dialogue:
        """Return the conversation of a body; raises InvalidRequest."""
        return Dialogue(
            body,
            self.front.vocabulary,
            tool_parser=self.tool_parser,
            trusts_templates=self.trusts_templates,
        )
