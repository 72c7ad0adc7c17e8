"""The items of a Responses request, and the chat messages that they make.

Items that follow each other and belong to one turn of the assistant, its reasoning, its text and
its calls, become one message, as chat templates know them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field

from loraplex_server.api.content_parts import as_parts, check_part
from loraplex_server.api.strict_body import StrictBody
from loraplex_server.api.tool_schemas import FunctionName, Text

_STATUS = Literal["in_progress", "completed", "incomplete"]


class InputText(StrictBody):
    """Text of a message; what our own answers carry beside it may come back."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"annotations": ([],)}

    type: Literal["input_text", "output_text", "text"]
    text: Text
    logprobs: list[Any] | None = None


class InputRefusal(StrictBody):
    """A part of an assistant's message in which it refused."""

    type: Literal["refusal"]
    refusal: Text


_Part = InputText | InputRefusal
_PART_KINDS: Final[Mapping[str, type[StrictBody]]] = {
    **dict.fromkeys(("input_text", "output_text", "text"), InputText),
    "refusal": InputRefusal,
}
ContentPart = Annotated[
    _Part,
    BeforeValidator(lambda value: check_part(value, _PART_KINDS), json_schema_input_type=_Part),
]


def _text_of(part: _Part) -> str:
    return part.text if isinstance(part, InputText) else part.refusal


class MessageItem(StrictBody):
    """A message; `type` may be left out."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[ContentPart],
        BeforeValidator(as_parts, json_schema_input_type=str | list[ContentPart]),
    ]
    id: str | None = None
    status: _STATUS | None = None
    phase: Literal["commentary", "final_answer"] | None = None

    @property
    def text(self) -> str:
        """All parts as one text."""
        return "\n".join(map(_text_of, self.content))


class FunctionCallItem(StrictBody):
    """A call that the model made."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "async": (False,),
        "caller": ({"type": "direct"},),
        "namespace": (),
    }

    type: Literal["function_call"]
    call_id: Text
    name: FunctionName
    arguments: Text
    id: str | None = None
    status: _STATUS | None = None


class FunctionOutputItem(StrictBody):
    """What a call returned."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Annotated[
        list[InputText], BeforeValidator(as_parts, json_schema_input_type=str | list[InputText])
    ]
    id: str | None = None
    status: _STATUS | None = None

    @property
    def text(self) -> str:
        """All parts as one text."""
        return "\n".join(part.text for part in self.output)


class ReasoningText(StrictBody):
    """Reasoning in words."""

    type: Literal["reasoning_text", "summary_text"]
    text: Text


class ReasoningItem(StrictBody):
    """What the model thought before it went on."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"encrypted_content": ()}

    type: Literal["reasoning"]
    summary: list[ReasoningText] = Field(default_factory=list)
    content: list[ReasoningText] | None = None
    id: str | None = None
    status: _STATUS | None = None

    @property
    def text(self) -> str:
        """The reasoning, or its summary where that is all."""
        return "\n".join(part.text for part in self.content or self.summary)


Item = MessageItem | FunctionCallItem | FunctionOutputItem | ReasoningItem
_KINDS: Final[Mapping[str, type[StrictBody]]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionOutputItem,
    "reasoning": ReasoningItem,
}


InputItem = Annotated[
    Item,
    BeforeValidator(
        lambda value: check_part(value, _KINDS, usual="message"), json_schema_input_type=Item
    ),
]


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


#: A text is what the user says.
Input = Annotated[
    list[InputItem],
    Field(min_length=1),
    BeforeValidator(_as_items, json_schema_input_type=str | list[InputItem]),
]


def messages_of(instructions: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
    """Return the messages of a chat request."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    turn: dict[str, Any] | None = None  # of the assistant, as long as it goes on
    for item in items:
        is_turn = not isinstance(item, FunctionOutputItem) and (
            not isinstance(item, MessageItem) or item.role == "assistant"
        )
        if is_turn and turn is None:
            turn = {"role": "assistant"}
            messages.append(turn)
        if isinstance(item, FunctionOutputItem):
            output = {"role": "tool", "tool_call_id": item.call_id, "content": item.text}
            messages.append(output)
        elif turn is None or not is_turn:
            assert isinstance(item, MessageItem)
            messages.append({"role": item.role, "content": item.text})
        else:
            turn = _add_to_turn(messages, turn, item)
        turn = turn if is_turn else None
    return [{"content": "", **message} for message in messages]


def _add_to_turn(
    messages: list[dict[str, Any]], turn: dict[str, Any], item: Item
) -> dict[str, Any]:
    """Add to the assistant's turn, or begin the next where it said its part already."""
    if isinstance(item, FunctionCallItem):
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        turn.setdefault("tool_calls", []).append(call)
        return turn
    assert isinstance(item, MessageItem | ReasoningItem)
    field = "content" if isinstance(item, MessageItem) else "reasoning"
    if field in turn or "tool_calls" in turn:
        turn = {"role": "assistant"}
        messages.append(turn)
    turn[field] = item.text
    return turn
