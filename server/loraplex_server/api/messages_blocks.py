"""The content blocks of a Messages request, and the chat messages that they make."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field

from loraplex_server.api.content_parts import as_parts, check_part
from loraplex_server.api.strict_body import StrictBody
from loraplex_server.api.tool_schemas import FunctionName, JsonObject, Text

#: Prompts that begin alike share their work anyway, so a hint to cache asks for nothing.
CACHE_HINTS: Final[tuple[Any, ...]] = (
    {"type": "ephemeral"},
    {"type": "ephemeral", "ttl": "5m"},
    {"type": "ephemeral", "ttl": "1h"},
)
_CACHED: Final[Mapping[str, tuple[Any, ...]]] = {"cache_control": CACHE_HINTS}


class TextBlock(StrictBody):
    """Text."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {**_CACHED, "citations": ([],)}

    type: Literal["text"]
    text: Text


class ToolUseBlock(StrictBody):
    """A call that the model made."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **_CACHED,
        "caller": ({"type": "direct"},),
        "toolset_name": (),
    }

    type: Literal["tool_use"]
    id: Text
    name: FunctionName
    input: JsonObject


class ToolResultBlock(StrictBody):
    """What a call returned."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {**_CACHED, "toolset_name": ()}

    type: Literal["tool_result"]
    tool_use_id: Text
    content: Annotated[
        list[TextBlock],
        BeforeValidator(as_parts, json_schema_input_type=str | list[TextBlock]),
    ] = Field(default_factory=list)
    is_error: bool | None = None

    @property
    def text(self) -> str:
        """All parts as one text; that the call failed is said in front."""
        text = "\n".join(block.text for block in self.content)
        return f"Error: {text}" if self.is_error else text


class ThinkingBlock(StrictBody):
    """What the model thought. Signatures are ours, and empty: thoughts are taken as they come."""

    type: Literal["thinking"]
    thinking: Text
    signature: str = ""


Block = TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock
_KINDS: Final[Mapping[str, type[StrictBody]]] = {
    "text": TextBlock,
    "tool_use": ToolUseBlock,
    "tool_result": ToolResultBlock,
    "thinking": ThinkingBlock,
}


ContentBlock = Annotated[
    Block,
    BeforeValidator(lambda value: check_part(value, _KINDS), json_schema_input_type=Block),
]


class Turn(StrictBody):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[
        list[ContentBlock],
        Field(min_length=1),
        BeforeValidator(as_parts, json_schema_input_type=str | list[ContentBlock]),
    ]

    @property
    def can_go_on(self) -> bool:
        """An answer can continue it: it has a text, and no call that comes behind that."""
        calls = any(isinstance(block, ToolUseBlock) for block in self.content)
        return bool(_joined(self.content)) and not calls

    def for_chat(self) -> list[dict[str, Any]]:
        """Return the messages of a chat request: results of calls are messages of their own."""
        messages: list[dict[str, Any]] = []
        message: dict[str, Any] = {"role": self.role, "content": _joined(self.content)}
        for block in self.content:
            if isinstance(block, ToolResultBlock):
                result = {"tool_call_id": block.tool_use_id, "content": block.text}
                messages.append({"role": "tool", **result})
            elif isinstance(block, ToolUseBlock):
                function = {"name": block.name, "arguments": json.dumps(block.input)}
                call = {"id": block.id, "type": "function", "function": function}
                message.setdefault("tool_calls", []).append(call)
            elif isinstance(block, ThinkingBlock):
                message["reasoning"] = message.get("reasoning", "") + block.thinking
        if message["content"] or len(message) > 2 or not messages:
            messages.append(message)
        return messages


def _joined(blocks: Sequence[Block]) -> str:
    return "\n".join(block.text for block in blocks if isinstance(block, TextBlock))
