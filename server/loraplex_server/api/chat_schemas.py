"""The JSON body of `POST /v1/chat/completions`, as pydantic checks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field, model_validator

from loraplex_server.api.schemas import UNSUPPORTED, GenerationBody
from loraplex_server.api.strict_body import StrictBody, invalid

_UNSUPPORTED_CHAT: Final[Mapping[str, tuple[Any, ...]]] = {
    **UNSUPPORTED,
    "add_generation_prompt": (True,),
    "audio": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
#: What our own answers carry, so that they can be sent back as part of a conversation.
_UNSUPPORTED_MESSAGE: Final[Mapping[str, tuple[Any, ...]]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "reasoning": (),
    "refusal": (),
    "tool_calls": ([],),
}


class TextPart(StrictBody):
    """One part of a message; this server reads text only."""

    type: Literal["text"]
    text: str


def _check_content(value: Any) -> Any:
    if not isinstance(value, str | list) or value == []:
        raise invalid("must be a string or a list of text parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class ChatMessage(StrictBody):
    """One turn of a conversation."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = _UNSUPPORTED_MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[TextPart],
        BeforeValidator(_check_content, json_schema_input_type=str | list[TextPart]),
    ]

    def for_template(self) -> dict[str, str]:
        """Return the message as chat templates know it: one text, and `developer` is `system`."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "\n".join(part.text for part in self.content)}


class ChatBody(GenerationBody):
    """The body of `POST /v1/chat/completions`."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = _UNSUPPORTED_CHAT

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("only allowed with `logprobs: true`", "top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise invalid("not together with `max_completion_tokens`", "max_tokens")
        return self
