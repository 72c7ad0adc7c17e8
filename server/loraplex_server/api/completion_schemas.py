"""The JSON body of `POST /v1/completions`, as pydantic checks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final

from pydantic import BeforeValidator, Field, model_validator

from loraplex_server.api.schemas import MAX_SAMPLES, UNSUPPORTED, GenerationBody
from loraplex_server.api.strict_body import invalid

MAX_PROMPTS: Final = 1024
#: Of a list of token ids that nobody computes; the bound on bodies is not far above it.
MAX_TOKEN_IDS: Final = 1 << 20

_UNSUPPORTED_COMPLETION: Final[Mapping[str, tuple[Any, ...]]] = {
    **UNSUPPORTED,
    "prompt_embeds": (),
    "suffix": ("",),
}


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def check_prompts(value: Any) -> Any:
    """Return prompts as a list, whichever way they were given."""
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


#: Always a list after validation: of texts, or of lists of token ids.
Prompts = Annotated[
    list[Any],
    BeforeValidator(check_prompts, json_schema_input_type=str | list[str | int | list[int]]),
]


class CompletionBody(GenerationBody):
    """The body of `POST /v1/completions`."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = _UNSUPPORTED_COMPLETION

    prompt: Prompts
    best_of: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None

    @property
    def num_samples(self) -> int:
        """See `GenerationBody`: those that are drawn, of which `n` are kept."""
        return self.best_of or self.num_kept

    @property
    def num_kept(self) -> int:
        """Choices of each prompt."""
        return self.n or 1

    @property
    def echoes_logprobs(self) -> bool:
        """The answer's log probabilities begin with the prompt's."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def is_prompt_only(self) -> bool:
        """Nothing is wanted but the prompt, as harnesses ask that score given texts."""
        return bool(self.echo) and self.max_tokens == 0

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionBody:
        if self.best_of is not None:
            if self.best_of < self.num_kept:
                raise invalid("must be at least `n`", "best_of")
            if self.best_of > self.num_kept and self.stream:
                raise invalid("not together with `stream: true`: the best is known last", "best_of")
        return self

    @model_validator(mode="after")
    def _check_echo(self) -> CompletionBody:
        if self.echoes_logprobs and self.prompt_logprobs not in (None, self.logprobs):
            raise invalid("must equal `logprobs` where `echo` shows both", "prompt_logprobs")
        return self
