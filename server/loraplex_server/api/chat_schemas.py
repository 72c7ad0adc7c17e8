"""The JSON body of `POST /v1/chat/completions`, as pydantic checks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final

from pydantic import BeforeValidator, Field, model_validator

from loraplex_server.api.chat_messages import ChatMessage
from loraplex_server.api.schemas import UNSUPPORTED, GenerationBody
from loraplex_server.api.strict_body import invalid
from loraplex_server.api.tool_schemas import MAX_TOOLS, AllowedChoice, NamedTool, Text, Tool
from loraplex_server.api.tool_schemas import ToolChoice as ToolChoiceValue

_UNSUPPORTED_CHAT: Final[Mapping[str, tuple[Any, ...]]] = {
    **UNSUPPORTED,
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "verbosity": (),
    "web_search_options": (),
}


def _check_tool_choice(value: Any) -> Any:
    """Check by hand what pydantic would report as the errors of every alternative."""
    if value is None or value in ("none", "auto", "required"):
        return value
    if isinstance(value, NamedTool | AllowedChoice):
        return value
    if isinstance(value, dict) and value.get("type") == "function":
        return NamedTool.model_validate(value)
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        return AllowedChoice.model_validate(value)
    raise invalid(
        'must be "none", "auto", "required", {"type": "function", "function": {"name": ...}} or '
        '{"type": "allowed_tools", ...}'
    )


class ChatBody(GenerationBody):
    """The body of `POST /v1/chat/completions`."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = _UNSUPPORTED_CHAT

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[
        ToolChoiceValue | None,
        BeforeValidator(_check_tool_choice, json_schema_input_type=ToolChoiceValue | None),
    ] = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Text | None = None
    include_reasoning: bool | None = None
    chat_template: Text | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("only allowed with `logprobs: true`", "top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise invalid("not together with `max_completion_tokens`", "max_tokens")
        return self

    @model_validator(mode="after")
    def _check_prompt_end(self) -> ChatBody:
        if self.echo and not self.continue_final_message:
            raise invalid("only allowed with `continue_final_message: true`", "echo")
        if not self.continue_final_message:
            return self
        if self.add_generation_prompt:
            raise invalid("not together with `add_generation_prompt`", "continue_final_message")
        last = self.messages[-1]
        if last.role != "assistant" or not last.text or last.tool_calls:
            raise invalid(
                "the last message must be a text of the assistant", "continue_final_message"
            )
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> ChatBody:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise invalid("two tools have the same name", "tools")
        choice = self.tool_choice
        if choice in (None, "none", "auto"):
            return self
        if not names:
            raise invalid("only allowed with `tools`", "tool_choice")
        if unknown := self.chosen_names - set(names):
            assert unknown
            raise invalid("names a function that is not in `tools`", "tool_choice")
        return self

    @property
    def chosen_names(self) -> set[str]:
        """The tools that may be called."""
        choice = self.tool_choice
        if choice == "none":
            return set()
        if isinstance(choice, NamedTool):
            return {choice.function.name}
        if isinstance(choice, AllowedChoice):
            return {tool.function.name for tool in choice.allowed_tools.tools}
        return {tool.function.name for tool in self.tools or ()}

    @property
    def must_call(self) -> bool:
        """The answer must be a call."""
        choice = self.tool_choice
        if isinstance(choice, AllowedChoice):
            return choice.allowed_tools.mode == "required"
        return choice == "required" or isinstance(choice, NamedTool)
