"""What the JSON bodies of all generation endpoints have in common, as pydantic checks it.

A field of OpenAI's or vLLM's API that is not implemented is refused unless it has a value that asks
for nothing (`UNSUPPORTED`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from loraplex_server.api.answer_shape import ShapeFields
from loraplex_server.api.model_fields import ModelFields, ModelName
from loraplex_server.api.model_names import ModelWish, Naming
from loraplex_server.api.strict_body import StrictBody, check_unicode, invalid

MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARS: Final = 1024
MAX_SAMPLES: Final = 128
MAX_BAD_WORDS: Final = 128
MAX_SALT_CHARS: Final = 256
#: Models that one request may be sent to.
MAX_MODELS: Final = 16
#: Room for a Unix time, which some clients order their requests by.
MAX_PRIORITY: Final = 2**53 - 1

UNSUPPORTED: Final[Mapping[str, tuple[Any, ...]]] = {
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logprob_token_ids": ([],),
    "metadata": ({},),
    "repetition_detection": (),
    "return_weight_versions": (False,),
    "service_tier": ("auto", "default"),
    "session_id": (),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "stream_interval": (1,),
    "thinking_token_budget": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}


class StreamOptions(StrictBody):
    """What a stream carries besides the text."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        # Padding against guessing texts from the sizes of packets: OpenAI's, and never sent here.
        "include_obfuscation": (True, False),
    }

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


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


def _check_bad_word(value: str) -> str:
    if not value.strip() or len(value) > MAX_STOP_CHARS:
        raise invalid(f"a bad word has 1 to {MAX_STOP_CHARS} characters, not only spaces")
    return check_unicode(value)


class RequestBody(ModelFields):
    """The fields that all requests share which the engine computes; None is the default of each."""

    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    user: str | None = None
    cache_salt: (
        Annotated[
            str, Field(min_length=1, max_length=MAX_SALT_CHARS), AfterValidator(check_unicode)
        ]
        | None
    ) = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    ttft_slo_s: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check_truncation(self) -> RequestBody:
        if self.truncate_prompt_tokens == 0:
            raise invalid("must be at least 1, or -1 for as many as fit", "truncate_prompt_tokens")
        if self.truncation_side is not None and self.truncate_prompt_tokens is None:
            raise invalid("only allowed with `truncate_prompt_tokens`", "truncation_side")
        return self


class GenerationBody(RequestBody, ShapeFields):
    """The fields that completions and chat completions share; None is the default of each."""

    models: (
        Annotated[
            list[Annotated[ModelName, Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_MODELS),
        ]
        | None
    ) = None
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
    allowed_token_ids: Annotated[list[int], Field(min_length=1)] | None = None
    bad_words: (
        Annotated[
            list[Annotated[str, AfterValidator(_check_bad_word)]], Field(max_length=MAX_BAD_WORDS)
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[list[str], BeforeValidator(check_stop)] = Field(default_factory=list)
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    request_id: Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,128}$")] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise invalid("only allowed with `stream: true`", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise invalid("not together with `stream: true`", "prompt_logprobs")
        return self

    @model_validator(mode="after")
    def _check_models(self) -> GenerationBody:
        if self.models is None:
            return self
        for name in ("model", "adapter_id", "lora_path", "adapter_scale", "adapters"):
            if getattr(self, name) is not None:
                raise invalid(f"not together with `{name}`", "models")
        if len(set(self.models)) < len(self.models):
            raise invalid("has a name twice; `n` asks one model several times", "models")
        return self

    @property
    def model_wishes(self) -> list[ModelWish]:
        """Who shall answer, each by itself."""
        if self.models is None:
            return [self.model_wish]
        return [
            ModelWish((Naming(f"models[{index}]", name),)) for index, name in enumerate(self.models)
        ]

    @property
    def num_samples(self) -> int:
        """Sequences to compute for each prompt and model."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """The stream ends with a chunk that carries the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def has_running_usage(self) -> bool:
        """Each chunk of the stream carries the usage of its choice so far."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)
