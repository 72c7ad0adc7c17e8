"""What an adapter's requests get where they do not say otherwise. Checked when it is stored."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

from jinja2 import TemplateSyntaxError
from jinja2.nodes import Pow
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

_MAX_TEXT_CHARS: Final = 64 << 10
#: As of requests.
_MAX_STOPS: Final = 16
_MAX_STOP_CHARS: Final = 1024
_GENERATION_TAG: Final = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


class _Strict(BaseModel):
    """Unknown keys are refused: none is accepted and ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def _one_or_several(value: Any) -> Any:
    return (
        (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
    )


def _check_template(source: str) -> str:
    try:
        # Parsed as it will be: with the tags that Hugging Face's templates use.
        environment = ImmutableSandboxedEnvironment(
            extensions=["jinja2.ext.loopcontrols"], trim_blocks=True, lstrip_blocks=True
        )
        parsed = environment.parse(_GENERATION_TAG.sub("", source))
    except TemplateSyntaxError as error:
        raise ValueError(f"not a Jinja template: line {error.lineno}: {error.message}") from None
    if power := parsed.find(Pow):  # no limit of time ends a long multiplication
        raise ValueError(f"line {power.lineno}: a chat template may not use `**`")
    return source


_Text = Annotated[str, Field(min_length=1, max_length=_MAX_TEXT_CHARS)]
_Stop = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARS)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]


class GenerationDefaults(_Strict):
    """Fields of a request, with a request's bounds; None leaves them as they are."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: (
        Annotated[tuple[_Stop, ...], Field(max_length=_MAX_STOPS), BeforeValidator(_one_or_several)]
        | None
    ) = None
    stop_token_ids: (
        Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_one_or_several)] | None
    ) = None


class AdapterDefaults(_Strict):
    """Immutable; `{}` changes nothing.

    Attributes:
        chat_template: Jinja, instead of the model's.
        system_prompt: the first message of conversations that have no system message.
        generation: of requests that do not set these fields themselves.
        max_context: tokens of prompt and answer together, below the model's limit.
    """

    chat_template: Annotated[_Text, AfterValidator(_check_template)] | None = None
    system_prompt: _Text | None = None
    generation: GenerationDefaults = GenerationDefaults()
    max_context: Annotated[int, Field(ge=1)] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what was set, and nothing else."""
        return self.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
