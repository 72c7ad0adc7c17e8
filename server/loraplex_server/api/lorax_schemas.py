"""The JSON body of LoRAX's `/generate`, and the same wish as a body of completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field, model_validator

from loraplex_server.api.answer_shape import Schema
from loraplex_server.api.completion_schemas import CompletionBody
from loraplex_server.api.errors import InvalidRequest
from loraplex_server.api.schemas import MAX_SAMPLES, check_stop
from loraplex_server.api.strict_body import StrictBody, invalid

#: Of LoRAX's parameters, by what they are called in completions.
_SAME_MEANING: Final[Mapping[str, str]] = {
    "ignore_eos_token": "ignore_eos",
    "max_new_tokens": "max_tokens",
    "repetition_penalty": "repetition_penalty",
    "seed": "seed",
    "stop": "stop",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "best_of": "best_of",
    "truncate": "truncate_prompt_tokens",
}


class LoraxResponseFormat(StrictBody):
    """LoRAX's `response_format`: JSON, by a schema if there is one."""

    type: Literal["text", "json_object", "json_schema"]
    schema_: Schema | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _check_schema(self) -> LoraxResponseFormat:
        if self.type == "text" and self.schema_ is not None:
            raise invalid("goes with the type `json_object`", "schema")
        return self


class LoraxParameters(StrictBody):
    """What LoRAX calls parameters; None is the default of each."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "adapter_source": (),
        "api_token": (),
        "merged_adapters": (),
        "typical_p": (1.0,),
        "watermark": (False,),
    }

    adapter_id: str | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    do_sample: bool | None = None
    max_new_tokens: int | None = None
    ignore_eos_token: bool | None = None
    stop: Annotated[list[str], BeforeValidator(check_stop)] = Field(default_factory=list)
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    return_k_alternatives: Annotated[int, Field(ge=1, le=20)] | None = None
    return_full_text: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    truncate: Annotated[int, Field(ge=1)] | None = None
    apply_chat_template: bool | None = None
    response_format: LoraxResponseFormat | None = None
    schema_: Schema | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _check_pairs(self) -> LoraxParameters:
        if (self.best_of or 1) > 1 and not self.is_sampled:
            raise invalid("needs `do_sample`: greedy answers are all alike", "best_of")
        if self.schema_ is not None and self.response_format is not None:
            raise invalid("not together with `response_format`", "schema")
        return self

    @property
    def shape(self) -> dict[str, Any]:
        """What the answer must look like, as a field of completions."""
        form = self.response_format
        schema = self.schema_ if form is None else form.schema_
        if schema is not None:
            return {"guided_json": schema}
        if form is not None and form.type != "text":
            return {"response_format": {"type": "json_object"}}
        return {}

    @property
    def is_sampled(self) -> bool:
        """Tokens are drawn, by LoRAX's rule: where `do_sample` or anything about drawing asks."""
        is_warped = self.temperature not in (None, 1.0) or self.top_p not in (None, 1.0)
        return bool(self.do_sample or is_warped or self.top_k)


class LoraxBody(StrictBody):
    """The body of `POST /generate` and `POST /generate_stream`."""

    inputs: str
    parameters: LoraxParameters = LoraxParameters()

    def as_completion(self, *, is_stream: bool) -> CompletionBody:
        """Return the same wish; fields that were not given are not given there either.

        Raises:
            InvalidRequest: a parameter asks for what this kind of answer does not have.
        """
        parameters = self.parameters
        _check_details(parameters, is_stream=is_stream)
        fields: dict[str, Any] = {
            _SAME_MEANING[name]: getattr(parameters, name)
            for name in parameters.model_fields_set & _SAME_MEANING.keys()
            if getattr(parameters, name) is not None
        }
        if not parameters.is_sampled:
            fields["temperature"] = 0.0
        return CompletionBody(
            adapter_id=parameters.adapter_id or "",
            prompt=[self.inputs],
            prompt_logprobs=0 if parameters.decoder_input_details and not is_stream else None,
            **parameters.shape,
            include_stop_str_in_output=True,  # where a text ends by one, LoRAX shows it
            stream=is_stream,
            **fields,
        )


def _check_details(parameters: LoraxParameters, *, is_stream: bool) -> None:
    if is_stream:
        refused = [
            ("decoder_input_details", parameters.decoder_input_details),
            ("return_full_text", parameters.return_full_text),
            ("best_of", (parameters.best_of or 1) > 1),
        ]
        for name, is_given in refused:
            if is_given:
                raise InvalidRequest(f"`{name}`: a stream cannot have it", param=name)
    elif not parameters.details:
        for name in ("decoder_input_details", "return_k_alternatives"):
            if getattr(parameters, name):
                raise InvalidRequest(f"`{name}`: needs `details`, which show it", param=name)
