"""`POST /tokenize` and `POST /detokenize`, as vLLM has them: what a model makes of a text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Final

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, Field, ValidationError, model_validator
from starlette.responses import Response

from loraplex_server.api.chat_messages import ChatMessage
from loraplex_server.api.chat_schemas import ChatBody
from loraplex_server.api.completion_schemas import MAX_TOKEN_IDS
from loraplex_server.api.completions import encode_prompts
from loraplex_server.api.dialogues import Dialogues
from loraplex_server.api.job_maker import PromptWish
from loraplex_server.api.json_text import compact
from loraplex_server.api.model_fields import ModelFields
from loraplex_server.api.strict_body import check_unicode, invalid
from loraplex_server.api.tool_schemas import MAX_TOOLS, Text, Tool

#: More are written in a thread: they would hold up every running stream.
_MANY_TOKENS: Final = 4096
_OF_CHAT: Final = (
    *("tools", "documents", "chat_template", "chat_template_kwargs", "reasoning_effort"),
    *("add_generation_prompt", "continue_final_message"),
)


class TokensFields(ModelFields):
    """Who tokenises: the base model, unless an adapter is named."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"adapter_scale": (), "adapters": ()}
    needs_model: ClassVar[bool] = False


class TokenizeBody(TokensFields):
    """The body of `POST /tokenize`: a text, or a conversation."""

    prompt: Annotated[str, AfterValidator(check_unicode)] | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: Text | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Text | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_input(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise invalid("give either this or `messages`", "prompt")
        if self.messages is None:
            for name in _OF_CHAT:
                if getattr(self, name) is not None:
                    raise invalid("goes with `messages`", name)
        return self


class DetokenizeBody(TokensFields):
    """The body of `POST /detokenize`."""

    tokens: Annotated[list[int], Field(max_length=MAX_TOKEN_IDS)]


def tokenize_router(dialogues: Dialogues) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter(tags=["tokens"])
    front = dialogues.front

    @router.post("/tokenize", response_model=None)
    async def tokenize(body: TokenizeBody, request: Request) -> Response:
        """Return the token ids of a text or a conversation, as requests would have them."""
        is_text = body.messages is None
        wish = _text_wish(body) if is_text else dialogues.begin(_chat(body)).wish()
        [token_ids], max_model_len = await front.encode(body.model_wish, wish, request)

        def write() -> str:
            name = front.vocabulary.token_text
            names = [name(i) for i in token_ids] if body.return_token_strs else None
            shown = {"count": len(token_ids), "max_model_len": max_model_len, "tokens": token_ids}
            return compact({**shown, "token_strs": names})

        return await _json(write, num_tokens=len(token_ids))

    @router.post("/detokenize", response_model=None)
    async def detokenize(body: DetokenizeBody, request: Request) -> Response:
        """Return the text of token ids, special tokens included."""
        front.vocabulary.check(body.tokens, param="tokens")
        await front.encode(body.model_wish, PromptWish(0, 0, lambda encoder: []), request)
        decode = front.vocabulary.decoder(skip_special_tokens=False)
        return await _json(
            lambda: compact({"prompt": decode(body.tokens)}), num_tokens=len(body.tokens)
        )

    return router


async def _json(write: Callable[[], str], *, num_tokens: int) -> Response:
    """Return the answer that `write` writes, where that holds nobody up."""
    text = await asyncio.to_thread(write) if num_tokens > _MANY_TOKENS else write()
    return Response(text, media_type="application/json")


def _text_wish(body: TokenizeBody) -> PromptWish:
    prompt = body.prompt or ""
    add_special = body.add_special_tokens is not False
    return PromptWish(
        num_prompts=1,
        num_chars=len(prompt),
        encode=lambda encoder: encode_prompts([prompt], encoder, add_special=add_special),
    )


def _chat(body: TokenizeBody) -> ChatBody:
    """Return the same conversation as a body of chat completions, checked as one."""
    names = ("messages", "add_special_tokens", *_OF_CHAT)
    given = {name: getattr(body, name) for name in names}
    try:
        return ChatBody.model_validate({"model": "", "adapter_id": "", **given})
    except ValidationError as error:
        problems = error.errors()
        raise RequestValidationError(
            [{**problem, "loc": ("body", *problem["loc"])} for problem in problems]
        ) from error
