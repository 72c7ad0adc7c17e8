"""Tools for chat templates that know none: described in the system prompt, as Hermes models are.

What the template cannot write becomes what it can: calls become the text that the model wrote, and
the results of tools become a message of the user.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from loraplex_server.text.vocabulary import Message

_INTRODUCTION: Final = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_INSTRUCTION: Final = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def with_tools_in_text(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the conversation in the roles `system`, `user` and `assistant` alone.

    Args:
        messages: as templates that know tools take them.
        tools: shown in the first message; none for a conversation that only has calls in it.
    """
    shown: list[dict[str, Any]] = []
    if tools:
        signatures = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        shown.append({"role": "system", "content": _INTRODUCTION + signatures + _INSTRUCTION})
    for index, message in enumerate(messages):
        if tools and index == 0 and message["role"] == "system":
            shown[0]["content"] = f"{message['content']}\n\n{shown[0]['content']}"
        elif message["role"] == "tool":
            _add_result(shown, str(message["content"]), follows=_is_tool(messages, index - 1))
        elif message.get("tool_calls"):
            shown.append({"role": "assistant", "content": _with_calls(message)})
        else:
            shown.append(dict(message))
    return shown


def _add_result(shown: list[dict[str, Any]], content: str, *, follows: bool) -> None:
    """Add the result of a tool; results that follow each other are one message."""
    text = f"<tool_response>\n{content}\n</tool_response>"
    if follows:
        shown[-1]["content"] += f"\n{text}"
    else:
        shown.append({"role": "user", "content": text})


def _is_tool(messages: Sequence[Message], index: int) -> bool:
    return index >= 0 and bool(messages[index]["role"] == "tool")


def _with_calls(message: Message) -> str:
    calls = [call["function"] for call in message["tool_calls"]]
    texts = [
        json.dumps({"name": call["name"], "arguments": call["arguments"]}, ensure_ascii=False)
        for call in calls
    ]
    marked = [f"<tool_call>\n{text}\n</tool_call>" for text in texts]
    return "\n".join([message["content"], *marked] if message["content"] else marked)
