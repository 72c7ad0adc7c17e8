"""The JSON body of LoRAX's `/generate`, and the same wish as a body of completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final

from pydantic import BeforeValidator, Field

from loraplex_server.api.completion_schemas import CompletionBody
from loraplex_server.api.schemas import check_stop
from loraplex_server.api.strict_body import StrictBody

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
}


class LoraxParameters(StrictBody):
    """What LoRAX calls parameters; None is the default of each."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "adapter_source": (),
        "api_token": (),
        "apply_chat_template": (False,),
        "best_of": (1,),
        "decoder_input_details": (False,),
        "merged_adapters": (),
        "response_format": (),
        "return_full_text": (False,),
        "return_k_alternatives": (),
        "schema": (),
        "truncate": (),
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
        """Return the same wish; fields that were not given are not given there either."""
        parameters = self.parameters
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
            include_stop_str_in_output=True,  # where a text ends by one, LoRAX shows it
            stream=is_stream,
            **fields,
        )
