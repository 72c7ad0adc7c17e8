"""The JSON bodies of `POST /v1/messages` and its `count_tokens`, and the chat they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field, model_validator

from loraplex_server.api.chat_schemas import ChatBody
from loraplex_server.api.content_parts import as_parts
from loraplex_server.api.messages_blocks import CACHE_HINTS, TextBlock, Turn
from loraplex_server.api.schemas import UNSUPPORTED, GenerationBody, check_stop
from loraplex_server.api.strict_body import StrictBody, invalid
from loraplex_server.api.tool_schemas import MAX_TOOLS, FunctionName, JsonObject, Parameters, Text

_UNSUPPORTED: Final[Mapping[str, tuple[Any, ...]]] = {
    **{name: values for name, values in UNSUPPORTED.items() if name != "metadata"},
    "cache_control": CACHE_HINTS,
    "container": (),
    "context_management": (),
    "diagnostics": (),
    "inference_geo": (),
    "mcp_servers": ([],),
    "models": (),
    "n": (1,),
    "prompt_logprobs": (),
    "response_format": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
    "stop": ([],),
    "stream_options": (),
    "user_profile_id": (),
    "workspace_id": (),
}


class MessagesTool(StrictBody):
    """A tool that the model may call; tools that a server would run are not known."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "allowed_callers": (["direct"],),
        "cache_control": CACHE_HINTS,
        "defer_loading": (False,),
        "eager_input_streaming": (True,),
        "input_examples": ([],),
    }

    name: FunctionName
    input_schema: Parameters
    description: Text | None = None
    strict: bool | None = None
    type: Literal["custom"] | None = None

    def for_chat(self) -> dict[str, Any]:
        """Return it as chat requests have it."""
        function = {"name": self.name, "description": self.description, "strict": self.strict}
        return {"type": "function", "function": {**function, "parameters": self.input_schema}}


class MessagesToolChoice(StrictBody):
    """Whether a tool must be called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check_name(self) -> MessagesToolChoice:
        if (self.type == "tool") != (self.name is not None):
            raise invalid("belongs to the type `tool`", "name")
        return self

    def for_chat(self) -> Any:
        """Return it as chat requests have it."""
        if self.name is not None:
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class Thinking(StrictBody):
    """Whether the model shall reason first, for templates that can be told."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None

    @model_validator(mode="after")
    def _check_bounds(self) -> Thinking:
        if self.budget_tokens is not None and self.type == "enabled":
            raise invalid("reasoning has no budget of its own here; leave it out", "budget_tokens")
        if self.display is not None:
            raise invalid("reasoning is shown as it is; leave it out", "display")
        return self


class JsonFormat(StrictBody):
    """The answer's text follows a JSON schema."""

    type: Literal["json_schema"]
    schema_: Annotated[JsonObject, Field(alias="schema")]


class OutputConfig(StrictBody):
    """Settings of the answer."""

    format: JsonFormat | None = None
    effort: Text | None = None


class Metadata(StrictBody):
    """About the request; not used."""

    user_id: str | None = None


class CountBody(GenerationBody):
    """The body of `POST /v1/messages/count_tokens`."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **_UNSUPPORTED,
        "max_tokens": (),
        "stream": (False,),
    }

    messages: Annotated[list[Turn], Field(min_length=1)]
    system: Annotated[
        list[TextBlock],
        BeforeValidator(as_parts, json_schema_input_type=str | list[TextBlock]),
    ] = Field(default_factory=list)
    tools: Annotated[list[MessagesTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: JsonObject | None = None

    @model_validator(mode="after")
    def _check_last(self) -> CountBody:
        last = self.messages[-1]
        if last.role == "assistant" and not last.can_go_on:
            raise invalid("the last is the user's, or a text of the assistant to go on", "messages")
        return self

    def for_chat(self) -> ChatBody:
        """Return the chat request that asks for the same; raises pydantic's ValidationError."""
        own = set(GenerationBody.model_fields)
        fields: dict[str, Any] = {name: getattr(self, name) for name in own & self.model_fields_set}
        fields["messages"] = self._chat_messages()
        if self.tools:
            fields["tools"] = [tool.for_chat() for tool in self.tools]
        if self.tool_choice is not None:
            fields["tool_choice"] = self.tool_choice.for_chat()
            if self.tool_choice.disable_parallel_tool_use is not None:
                is_single = self.tool_choice.disable_parallel_tool_use
                fields["parallel_tool_calls"] = not is_single
        if self.messages[-1].role == "assistant":  # a prefilled answer goes on
            fields["continue_final_message"] = True
        if (config := self.output_config) is not None:
            fields |= _output_fields(config)
        return ChatBody.model_validate({**fields, **self._template_fields()})

    def _chat_messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.system:
            system = "\n".join(block.text for block in self.system)
            messages.append({"role": "system", "content": system})
        for turn in self.messages:
            messages += turn.for_chat()
        return messages

    def _template_fields(self) -> dict[str, Any]:
        args = dict(self.chat_template_kwargs or {})
        if self.thinking is not None and self.thinking.type != "adaptive":
            args["enable_thinking"] = self.thinking.type == "enabled"
        return {"chat_template_kwargs": args} if args else {}


class MessagesBody(CountBody):
    """The body of `POST /v1/messages`."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = _UNSUPPORTED

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[list[str], BeforeValidator(check_stop)] = Field(default_factory=list)
    metadata: Metadata | None = None

    def for_chat(self) -> ChatBody:
        """See `CountBody.for_chat`."""
        chat = super().for_chat()
        if not self.stop_sequences:
            return chat
        return chat.model_copy(update={"stop": self.stop_sequences})


def _output_fields(config: OutputConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if config.effort is not None:
        fields["reasoning_effort"] = config.effort
    if config.format is not None:
        schema = {"name": "answer", "schema": config.format.schema_}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields
