"""Tools and the choice among them, as the body of a chat request names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field

from loraplex_server.api.strict_body import StrictBody, check_unicode, invalid

MAX_TOOLS: Final = 128

FunctionName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")]
Text = Annotated[str, AfterValidator(check_unicode)]


def check_parameters(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a function's parameters; they must be an object's."""
    if schema.get("type", "object") != "object":
        raise invalid("must be a JSON schema of type `object`")
    return schema


Parameters = Annotated[dict[str, Any], AfterValidator(check_parameters)]


def argument_schema(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the JSON schema of a function's arguments; without parameters there are none."""
    if not parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **parameters}


class Function(StrictBody):
    """A function that the model may call."""

    name: FunctionName
    description: Text | None = None
    parameters: Parameters | None = None
    strict: bool | None = None


class Tool(StrictBody):
    """One tool; only functions are known."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """Return it as chat templates know it."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        schema = {"type": "object", "properties": {}, **(self.function.parameters or {})}
        return {"type": "function", "function": {**function, "parameters": schema}}


class FunctionChoice(StrictBody):
    """The name of a function."""

    name: FunctionName


class NamedTool(StrictBody):
    """One tool by its name: the one to call, or one of those allowed."""

    type: Literal["function"]
    function: FunctionChoice


class AllowedTools(StrictBody):
    """Some of the tools, and whether one must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedChoice(StrictBody):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedChoice
