"""What the JSON bodies of all generation endpoints have in common, as pydantic checks it.

Types are strict, unknown fields are refused by name, and a field of OpenAI's or vLLM's API that is
not implemented is refused unless it has a value that asks for nothing (`_NO_OP`): nothing is ever
accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, LiteralString

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from loraplex_server.api.model_names import ModelWish, Naming
from loraplex_server.text.errors import InvalidText
from loraplex_server.text.vocabulary import check_text

MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARS: Final = 1024
MAX_SAMPLES: Final = 128
#: Each costs another pass over the linears.
MAX_MIXED: Final = 8
#: Room for a Unix time, which some clients order their requests by.
MAX_PRIORITY: Final = 2**53 - 1

UNSUPPORTED: Final[Mapping[str, tuple[Any, ...]]] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1.0,),
    "metadata": (),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}


def invalid(message: LiteralString, param: str | None = None) -> PydanticCustomError:
    return PydanticCustomError("invalid", message, {"param": param} if param else None)


class StrictBody(BaseModel):
    """Strict types, no unknown fields, no-op values of unsupported ones."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_no_ops(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name not in cls.unsupported:
                kept[name] = value
            elif value is not None and value not in cls.unsupported[name]:
                raise PydanticCustomError(
                    "unsupported", "this server does not support it", {"param": name}
                )
        return kept


class StreamOptions(StrictBody):
    """What a stream carries besides the text."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "continuous_usage_stats": (False,),
        "include_obfuscation": (False,),
    }

    include_usage: bool | None = None


def check_unicode(value: str) -> str:
    try:
        check_text(value)
    except InvalidText as error:
        raise ValueError(str(error)) from None
    return value


def check_stop(value: Any) -> Any:
    """Return stop strings as a list, whichever way they were given."""
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise invalid("must be a string or a list of strings")
    if len(stops) > MAX_STOP_STRINGS:
        raise invalid(f"at most {MAX_STOP_STRINGS} stop strings")
    if any(not 1 <= len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise invalid(f"a stop string has 1 to {MAX_STOP_CHARS} characters")
    return stops


def _check_lora_path(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise invalid("must be one name, or a list of one: all prompts have the same adapter")
    return value[0]


def _check_logit_bias(value: Any) -> Any:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid("must be an object of token ids and numbers")
    biases = {}
    for key, bias in value.items():
        if not (str(key).isascii() and str(key).isdigit() and len(str(key)) < 10):
            raise invalid("its keys must be token ids")
        biases[int(key)] = bias
    return biases


#: More would only overflow what is computed.
Weight = Annotated[float, Field(ge=-100, le=100)]


class WeightedName(StrictBody):
    """One adapter of a mixture, and the factor on all that it adds."""

    name: Annotated[str, Field(min_length=1), AfterValidator(check_unicode)]
    weight: Weight = 1.0


class GenerationBody(StrictBody):
    """The fields that completions and chat completions share; None is the default of each."""

    model: Annotated[str, AfterValidator(check_unicode)] | None = None
    adapter_id: Annotated[str, AfterValidator(check_unicode)] | None = None
    lora_path: Annotated[
        Annotated[str, AfterValidator(check_unicode)] | None,
        BeforeValidator(_check_lora_path, json_schema_input_type=str | list[str | None] | None),
    ] = None
    adapter_scale: Weight | None = None
    adapters: Annotated[list[WeightedName], Field(min_length=1, max_length=MAX_MIXED)] | None = None
    max_tokens: int | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[int, float], BeforeValidator(_check_logit_bias)] = Field(
        default_factory=dict
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[list[str], BeforeValidator(check_stop)] = Field(default_factory=list)
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    ttft_slo_s: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_model(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("model"):
            others = (data.get("adapter_id"), data.get("lora_path"), data.get("adapters"))
            if others == (None, None, None):
                raise PydanticCustomError("missing", "Field required", {"param": "model"})
        return data

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise invalid("only allowed with `stream: true`", "stream_options")
        return self

    @property
    def model_wish(self) -> ModelWish:
        """Who shall answer."""
        given = {"model": self.model, "adapter_id": self.adapter_id, "lora_path": self.lora_path}
        return ModelWish(
            tuple(Naming(param, name) for param, name in given.items() if name is not None),
            mixture=tuple((adapter.name, adapter.weight) for adapter in self.adapters or ()),
            scale=self.adapter_scale,
        )

    @property
    def includes_usage(self) -> bool:
        """The stream ends with a chunk that carries the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)
