"""How a family of models is shown tools, and how it writes calls of them.

A model's chat template tells its family. A template that knows no tools gets them described in the
system prompt, in the words that Hermes models (NousResearch, then Qwen) were trained on.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from loraplex_server.text.chat_template import ChatTemplate
from loraplex_server.text.tool_parser import CallSyntax


@dataclass(frozen=True)
class ToolFormat:
    """One family's way.

    Attributes:
        arguments_key: what a call's arguments are called.
        list_marks: around all calls behind one mark.
        max_calls: that one answer may have; None for any number.
        id_len: of the ids of calls that its templates insist on; None for OpenAI's.
        is_named: calls are written as a name, `[ARGS]` and the arguments.
    """

    name: str
    syntax: CallSyntax
    arguments_key: str = "arguments"
    list_marks: tuple[str, str] = ("", "")
    separator: str = ""
    max_calls: int | None = None
    id_len: int | None = None
    is_named: bool = False

    def new_call_id(self) -> str:
        """Return the id of one more call."""
        if self.id_len is None:
            return f"call_{secrets.token_hex(12)}"
        alphabet = string.ascii_letters + string.digits
        return "".join(secrets.choice(alphabet) for _ in range(self.id_len))


HERMES: Final = ToolFormat("hermes", CallSyntax("<tool_call>", "</tool_call>"), separator="\n")
LLAMA3_JSON: Final = ToolFormat(
    "llama3_json",
    CallSyntax("<|python_tag|>", separators=";", is_bare=True),
    arguments_key="parameters",
    max_calls=1,  # its templates refuse conversations with more of them
)
MISTRAL: Final = ToolFormat(
    "mistral",
    CallSyntax("[TOOL_CALLS]", separators="[,]", has_named_calls=True),
    list_marks=("[", "]"),
    separator=", ",
    id_len=9,
)
MISTRAL_NAMED: Final = ToolFormat(
    "mistral",
    CallSyntax("[TOOL_CALLS]", separators="[,]", has_named_calls=True),
    id_len=9,
    is_named=True,
)
GRANITE: Final = ToolFormat(
    "granite", CallSyntax("<|tool_call|>", separators="[,]"), list_marks=("[", "]"), separator=", "
)

TOOL_FORMATS: Final[Mapping[str, ToolFormat]] = {
    tool_format.name: tool_format for tool_format in (HERMES, LLAMA3_JSON, MISTRAL, GRANITE)
}
#: Values of the setting `tool_parser`.
TOOL_PARSERS: Final = ("auto", *TOOL_FORMATS, "none")


def choose_tool_format(template: ChatTemplate, tool_parser: str) -> ToolFormat | None:
    """Return the family's format; None if nobody knows how it writes calls.

    Args:
        tool_parser: the setting, one of TOOL_PARSERS.
    """
    text = template.text
    if tool_parser == "none":
        return None
    is_named = "[ARGS]" in text
    if tool_parser == "mistral" or (tool_parser == "auto" and "[TOOL_CALLS]" in text):
        return MISTRAL_NAMED if is_named else MISTRAL
    if tool_parser != "auto":
        return TOOL_FORMATS[tool_parser]
    if not template.knows("tools"):
        return HERMES
    if "<|tool_call|>" in text:
        return GRANITE
    if "<tool_call>" in text and not any(other in text for other in _OTHERS_OF_THAT_MARK):
        return HERMES
    if "<|python_tag|>" in text or ("ipython" in text and '"parameters": ' in text):
        return LLAMA3_JSON
    return None


#: Qwen3-Coder and GLM write calls as XML behind the same mark.
_OTHERS_OF_THAT_MARK: Final = ("<function=", "<arg_key>")
