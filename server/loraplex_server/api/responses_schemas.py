"""The JSON body of `POST /v1/responses`, as pydantic checks it, and the chat it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field, model_validator

from loraplex_server.api.chat_schemas import ChatBody
from loraplex_server.api.responses_items import Input, messages_of
from loraplex_server.api.schemas import UNSUPPORTED, GenerationBody
from loraplex_server.api.strict_body import StrictBody, invalid
from loraplex_server.api.tool_schemas import MAX_TOOLS, FunctionName, JsonObject, Parameters, Text

LOGPROBS: Final = "message.output_text.logprobs"
_MAX_METADATA: Final = 16

_STATELESS: Final[Mapping[str, tuple[Any, ...]]] = {
    "background": (False,),
    "conversation": (),
    "previous_response_id": (),
    "store": (False,),
}
_UNSUPPORTED: Final[Mapping[str, tuple[Any, ...]]] = {
    **{name: values for name, values in UNSUPPORTED.items() if name not in ("metadata", "store")},
    "context_management": ([],),
    "max_tokens": (),
    "max_tool_calls": (),
    "moderation": (),
    "models": (),
    "n": (1,),
    "prompt_logprobs": (),
    "prompt": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
    "response_format": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "stream_options": ({"include_obfuscation": False}, {"include_obfuscation": True}),
    "truncation": ("disabled",),
}


class FunctionTool(StrictBody):
    """A function that the model may call."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "allowed_callers": (["direct"],),
        "async": (False,),
        "defer_loading": (False,),
        "output_schema": (),
    }

    type: Literal["function"]
    name: FunctionName
    description: Text | None = None
    parameters: Parameters | None = None
    strict: bool | None = None

    def for_chat(self) -> dict[str, Any]:
        """Return it as chat requests have it."""
        fields = ("name", "description", "parameters", "strict")
        return {"type": "function", "function": {name: getattr(self, name) for name in fields}}


class NamedFunction(StrictBody):
    """One function by its name: the one to call, or one of those allowed."""

    type: Literal["function"]
    name: FunctionName

    def for_chat(self) -> dict[str, Any]:
        """Return it as chat requests have it."""
        return {"type": "function", "function": {"name": self.name}}


class AllowedFunctions(StrictBody):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=MAX_TOOLS)]

    def for_chat(self) -> dict[str, Any]:
        """Return it as chat requests have it."""
        tools = [tool.for_chat() for tool in self.tools]
        return {"type": "allowed_tools", "allowed_tools": {"mode": self.mode, "tools": tools}}


class TextFormat(StrictBody):
    """What the answer's text must be."""

    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = None
    description: Text | None = None
    schema_: Annotated[JsonObject | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise invalid("belongs to the type `json_schema`", "schema")
        return self

    def for_chat(self) -> dict[str, Any]:
        """Return it as chat requests have it."""
        if self.schema_ is None:
            return {"type": self.type}
        schema: dict[str, Any] = {"name": self.name or "answer", "schema": self.schema_}
        if self.strict is not None:
            schema["strict"] = self.strict
        return {"type": "json_schema", "json_schema": schema}


class TextConfig(StrictBody):
    """Settings of the answer's text."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}

    format: TextFormat | None = None


class ReasoningConfig(StrictBody):
    """Settings of the model's reasoning; `effort` is for templates that know it."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "generate_summary": (),
        "summary": ("auto",),
    }

    effort: Text | None = None


_CHOICES: Final[Mapping[str, type[StrictBody]]] = {
    "function": NamedFunction,
    "allowed_tools": AllowedFunctions,
}


def _check_tool_choice(value: Any) -> Any:
    if value is None or value in ("none", "auto", "required"):
        return value
    kind = _CHOICES.get(value.get("type", "")) if isinstance(value, dict) else None
    if kind is None:
        raise invalid('must be "none", "auto", "required", or name functions of `tools`')
    return kind.model_validate(value)


_ToolChoice = Literal["none", "auto", "required"] | NamedFunction | AllowedFunctions


class ResponsesBody(GenerationBody):
    """The body of `POST /v1/responses`."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {**_UNSUPPORTED, **_STATELESS}

    input: Input
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[
        _ToolChoice | None,
        BeforeValidator(_check_tool_choice, json_schema_input_type=_ToolChoice | None),
    ] = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: (
        Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=_MAX_METADATA)]
        | None
    ) = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    chat_template_kwargs: JsonObject | None = None

    @model_validator(mode="before")
    @classmethod
    def _say_stateless(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, no_ops in _STATELESS.items():
                if data.get(name) is not None and data[name] not in no_ops:
                    raise invalid(
                        "this server keeps no responses; send the whole conversation in `input`",
                        name,
                    )
        return data

    @property
    def has_logprobs(self) -> bool:
        """The text comes with its log probabilities."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    def for_chat(self) -> ChatBody:
        """Return the chat request that asks for the same; raises pydantic's ValidationError."""
        own = set(GenerationBody.model_fields)
        fields: dict[str, Any] = {name: getattr(self, name) for name in own & self.model_fields_set}
        fields["messages"] = messages_of(self.instructions, self.input)
        fields["max_completion_tokens"] = self.max_output_tokens
        fields["tools"] = [tool.for_chat() for tool in self.tools or ()]
        fields["tool_choice"] = _chat_choice(self.tool_choice)
        fields["parallel_tool_calls"] = self.parallel_tool_calls
        fields["chat_template_kwargs"] = self.chat_template_kwargs
        if self.text is not None and self.text.format is not None:
            fields["response_format"] = self.text.format.for_chat()
        if self.reasoning is not None:
            fields["reasoning_effort"] = self.reasoning.effort
        if self.has_logprobs:
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        return ChatBody.model_validate(_without_nulls(fields))


def _chat_choice(choice: Any) -> Any:
    return choice.for_chat() if isinstance(choice, NamedFunction | AllowedFunctions) else choice


def _without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    """An explicit null asks for the server's own default of a shared field, so only others go."""
    shared = GenerationBody.model_fields
    return {name: value for name, value in fields.items() if value is not None or name in shared}
