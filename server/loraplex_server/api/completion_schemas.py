"""The JSON body of `POST /v1/completions`, as pydantic checks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final

from pydantic import BeforeValidator, Field, model_validator

from loraplex_server.api.schemas import UNSUPPORTED, GenerationBody, invalid

MAX_PROMPTS: Final = 1024

_UNSUPPORTED_COMPLETION: Final[Mapping[str, tuple[Any, ...]]] = {
    **UNSUPPORTED,
    "best_of": (1,),
    "prompt_embeds": (),
    "suffix": ("",),
}


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _check_prompt(value: Any) -> Any:
    if isinstance(value, str) or _is_token_list(value):
        return [value]
    if isinstance(value, list) and 1 <= len(value) <= MAX_PROMPTS:
        if all(isinstance(item, str) for item in value):
            return value
        if all(_is_token_list(item) for item in value):
            return value
    raise invalid(
        "must be a string, a list of strings, a list of token ids or a list of such lists, "
        f"none of them empty, at most {MAX_PROMPTS} prompts"
    )


class CompletionBody(GenerationBody):
    """The body of `POST /v1/completions`; `prompt` is always a list after validation."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = _UNSUPPORTED_COMPLETION

    prompt: Annotated[
        list[Any],
        BeforeValidator(_check_prompt, json_schema_input_type=str | list[str | int | list[int]]),
    ]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _check_echo(self) -> CompletionBody:
        if self.echo and self.logprobs is not None:
            raise invalid("not supported together with `logprobs`", "echo")
        return self
