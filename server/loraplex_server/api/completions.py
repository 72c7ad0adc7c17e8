"""`POST /v1/completions`: text or token ids in, their continuation out."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from loraplex_server.api.completion_format import CompletionFormat
from loraplex_server.api.completion_schemas import CompletionBody
from loraplex_server.api.front import Front, Wish, new_id
from loraplex_server.api.prompts import PromptEncoder

#: OpenAI's default of `max_tokens` here.
_DEFAULT_TOKENS = 16


def completions_router(front: Front) -> APIRouter:
    """Return the endpoint."""
    router = APIRouter()

    @router.post("/v1/completions", tags=["generation"], response_model=None)
    async def create_completion(body: CompletionBody, request: Request) -> Response:
        """Continue each prompt, `n` times."""
        return await front.answer(
            body,
            request,
            completion_wish(body, default_tokens=_DEFAULT_TOKENS, logprobs=body.logprobs),
            new_id("cmpl", body.request_id),
            lambda job: CompletionFormat(job, body, front.vocabulary),
        )

    return router


def completion_wish(
    body: CompletionBody, *, default_tokens: int | None, logprobs: int | None
) -> Wish:
    """Return what the body asks for, with an endpoint's own default and wish of logprobs."""
    if logprobs is None and body.num_samples > body.num_kept:
        logprobs = 0  # the best are chosen by them
    return Wish(
        num_prompts=len(body.prompt),
        num_chars=sum(len(prompt) for prompt in body.prompt),
        encode=lambda encoder: encode_prompts(
            body.prompt, encoder, add_special=body.add_special_tokens is not False
        ),
        max_tokens=1 if body.is_prompt_only else body.max_tokens,
        default_tokens=default_tokens,
        logprobs=logprobs,
        prompt_logprobs=logprobs if body.echoes_logprobs else None,
        is_prompt_only=body.is_prompt_only,
    )


def encode_prompts(
    prompts: list[str | list[int]], encoder: PromptEncoder, *, add_special: bool
) -> list[list[int]]:
    """Return the token ids of each prompt; texts are encoded, and ids checked."""
    return [
        encoder.encode(prompt, add_special_tokens=add_special)
        if isinstance(prompt, str)
        else encoder.check(prompt)
        for prompt in prompts
    ]
