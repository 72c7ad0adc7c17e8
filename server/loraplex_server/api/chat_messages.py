"""The messages of a chat request, and what chat templates are given of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field, model_validator

from loraplex_server.api.content_parts import as_parts, check_part
from loraplex_server.api.strict_body import StrictBody, invalid
from loraplex_server.api.tool_schemas import FunctionName, Text, is_plain_json

#: What our own answers carry, so that they can be sent back as part of a conversation.
_UNSUPPORTED: Final[Mapping[str, tuple[Any, ...]]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "logprobs": (),
}


class TextPart(StrictBody):
    """One part of a message; this server reads text only."""

    type: Literal["text"]
    text: Text


class RefusalPart(StrictBody):
    """A part of an assistant's message in which it refused."""

    type: Literal["refusal"]
    refusal: Text


_Part = TextPart | RefusalPart
_KINDS: Final[Mapping[str, type[StrictBody]]] = {"text": TextPart, "refusal": RefusalPart}
ContentPart = Annotated[
    _Part,
    BeforeValidator(lambda value: check_part(value, _KINDS), json_schema_input_type=_Part),
]


class CalledFunction(StrictBody):
    """What an assistant called; `arguments` is JSON as it wrote it."""

    name: FunctionName
    arguments: Text


class ToolCall(StrictBody):
    """A call in an assistant's message; `index` is what streams add to it."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def for_template(self) -> dict[str, Any]:
        """Return the call as templates know it: its arguments as an object, if they are one."""
        function = {"name": self.function.name, "arguments": _object_of(self.function.arguments)}
        return {"id": self.id, "type": "function", "function": function}


def _object_of(arguments: str) -> dict[str, Any] | str:
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments  # the model's own mistake: it should see what it wrote
    return value if isinstance(value, dict) and is_plain_json(value) else arguments


def _check_content(value: Any) -> Any:
    if value is None:
        return []
    if not isinstance(value, str | list) or value == []:
        raise invalid("must be a string or a list of text parts")
    return as_parts(value)


class ChatMessage(StrictBody):
    """One turn of a conversation."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = _UNSUPPORTED

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        list[ContentPart],
        BeforeValidator(_check_content, json_schema_input_type=str | list[ContentPart] | None),
    ] = Field(default_factory=list)
    name: Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = None
    refusal: Text | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None

    @model_validator(mode="after")
    def _check_role(self) -> ChatMessage:
        is_assistant = self.role == "assistant"
        for field in ("tool_calls", "refusal", "reasoning", "reasoning_content"):
            if not is_assistant and getattr(self, field):
                raise invalid("only in messages of the assistant", field)
        if self.role == "tool" and self.tool_call_id is None:
            raise invalid("a message of the role `tool` names the call it answers", "tool_call_id")
        if self.role != "tool" and self.tool_call_id is not None:
            raise invalid("only in messages of the role `tool`", "tool_call_id")
        if not is_assistant and any(isinstance(part, RefusalPart) for part in self.content):
            raise invalid("refusals are only in messages of the assistant", "content")
        if not (self.content or self.tool_calls or self.refusal):
            raise invalid("must be a string or a list of text parts", "content")
        return self

    @property
    def text(self) -> str:
        """All parts as one text; a refusal is what the assistant said."""
        parts = [p.text if isinstance(p, TextPart) else p.refusal for p in self.content]
        return "\n".join(parts) or self.refusal or ""

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates know it: one text, and `developer` is `system`."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.text}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if reasoning := self.reasoning or self.reasoning_content:
            message["reasoning_content"] = reasoning
        return message


def messages_for_template(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return a conversation as chat templates know it; results of tools get the tool's name."""
    names: dict[str, str] = {}
    shown = []
    for message in messages:
        for call in message.tool_calls or ():
            names[call.id] = call.function.name
        turn = message.for_template()
        if message.role == "tool" and (name := names.get(message.tool_call_id or "")):
            turn.setdefault("name", name)
        shown.append(turn)
    return shown
