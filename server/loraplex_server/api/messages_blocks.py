"""The content blocks of a Messages request, and the chat messages that they make."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field

from loraplex_server.api.strict_body import StrictBody, invalid
from loraplex_server.api.tool_schemas import FunctionName, Text

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
    input: dict[str, Any]


def _check_result(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class ToolResultBlock(StrictBody):
    """What a call returned."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {**_CACHED, "toolset_name": ()}

    type: Literal["tool_result"]
    tool_use_id: Text
    content: Annotated[
        list[TextBlock],
        BeforeValidator(_check_result, json_schema_input_type=str | list[TextBlock]),
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


def _check_block(value: Any) -> Any:
    """Choose the kind by hand: pydantic would report the errors of every one of them."""
    if not isinstance(value, dict):
        raise invalid("must be an object with a `type`")
    kind = _KINDS.get(str(value.get("type")))
    if kind is None:
        raise invalid("must be `text`, `tool_use`, `tool_result` or `thinking`", "type")
    return kind.model_validate(value)


ContentBlock = Annotated[Block, BeforeValidator(_check_block, json_schema_input_type=Block)]


def _check_content(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Turn(StrictBody):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[
        list[ContentBlock],
        Field(min_length=1),
        BeforeValidator(_check_content, json_schema_input_type=str | list[ContentBlock]),
    ]

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
