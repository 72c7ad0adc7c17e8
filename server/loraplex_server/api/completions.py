"""`POST /v1/completions`: text or token ids in, their continuation out."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from loraplex_server.api.answer import OpenAIStreamEnd, Written
from loraplex_server.api.completion_schemas import CompletionBody
from loraplex_server.api.front import Front, Wish, new_id, unix_time
from loraplex_server.api.job import Job
from loraplex_server.api.json_text import compact
from loraplex_server.api.logprobs import CompletionLogprobs
from loraplex_server.api.prompts import PromptEncoder
from loraplex_server.api.usage import Usage
from loraplex_server.text.assembler import TextDelta
from loraplex_server.text.vocabulary import Vocabulary

#: OpenAI's default of `max_tokens` here.
_DEFAULT_TOKENS = 16


def completions_router(front: Front) -> APIRouter:
    """Return the endpoint."""
    router = APIRouter()

    @router.post("/v1/completions", tags=["generation"], response_model=None)
    async def create_completion(body: CompletionBody, request: Request) -> Response:
        """Continue each prompt, `n` times."""
        job_id = new_id("cmpl")
        return await front.answer(
            body,
            request,
            completion_wish(body, default_tokens=_DEFAULT_TOKENS, logprobs=body.logprobs),
            job_id,
            lambda job: CompletionFormat(job, body, front.vocabulary),
        )

    return router


def completion_wish(
    body: CompletionBody, *, default_tokens: int | None, logprobs: int | None
) -> Wish:
    """Return what the body asks for, with an endpoint's own default and wish of logprobs."""

    def encode(encoder: PromptEncoder) -> list[list[int]]:
        prompts = []
        for prompt in body.prompt:
            if isinstance(prompt, str):
                add_special = body.add_special_tokens is not False
                prompts.append(encoder.encode(prompt, add_special_tokens=add_special))
            else:
                prompts.append(encoder.check(prompt))
        return prompts

    return Wish(
        num_prompts=len(body.prompt),
        num_chars=sum(len(prompt) for prompt in body.prompt),
        encode=encode,
        max_tokens=body.max_tokens,
        default_tokens=default_tokens,
        logprobs=logprobs,
    )


class CompletionFormat(OpenAIStreamEnd):
    """Implements `AnswerFormat` in the shape of `text_completion`."""

    def __init__(self, job: Job, body: CompletionBody, vocabulary: Vocabulary) -> None:
        self._job = job
        self._includes_usage = body.includes_usage
        self._echoes = self._echoed(body, vocabulary) if body.echo else None
        self._logprobs: list[CompletionLogprobs] | None = None
        if body.logprobs is not None:
            skip = job.text.skip_special_tokens
            self._logprobs = [
                CompletionLogprobs(vocabulary, skip_special_tokens=skip)
                for _ in range(job.num_sequences)
            ]
        self._envelope = {
            "id": job.job_id,
            "object": "text_completion",
            "created": unix_time(),
            "model": job.model,
        }
        self._chunk_head = b"data: " + compact(self._envelope).encode()[:-1]
        self._chunk_tail = b',"usage":null}\n\n' if self._includes_usage else b"}\n\n"

    def _echoed(self, body: CompletionBody, vocabulary: Vocabulary) -> list[str]:
        decode = vocabulary.decoder(skip_special_tokens=self._job.text.skip_special_tokens)
        texts = [prompt if isinstance(prompt, str) else decode(prompt) for prompt in body.prompt]
        return [text for text in texts for _ in range(self._job.n)]

    def complete(self, sequences: list[Written], usage: Usage) -> dict[str, Any]:
        """See `AnswerFormat`."""
        choices = []
        for index, written in enumerate(sequences):
            text = (self._echoes[index] if self._echoes else "") + written.text
            logprobs = self._logprobs[index].write(written.tokens) if self._logprobs else None
            choices.append(
                {
                    "index": index,
                    "text": text,
                    "logprobs": logprobs,
                    "finish_reason": written.finish_reason,
                    "stop_reason": written.stop_reason,
                }
            )
        return {**self._envelope, "choices": choices, "usage": usage}

    def stream_head(self) -> bytes:
        """See `AnswerFormat`."""
        echoes = enumerate(self._echoes or ())
        return b"".join([self._chunk(index, text, "null", "null") for index, text in echoes])

    def stream_delta(self, index: int, delta: TextDelta) -> bytes:
        """See `AnswerFormat`."""
        logprobs = "null"
        if self._logprobs is not None and delta.tokens:
            logprobs = compact(self._logprobs[index].write(delta.tokens))
        elif not delta.text and delta.finish_reason is None:
            return b""
        finish = "null"
        if delta.finish_reason is not None:
            finish = f'"{delta.finish_reason.value}","stop_reason":{compact(delta.stop_reason)}'
        return self._chunk(index, delta.text, logprobs, finish)

    def stream_tail(self, usage: Usage) -> bytes:
        """See `AnswerFormat`."""
        if not self._includes_usage:
            return b""
        last = {**self._envelope, "choices": [], "usage": usage}
        return b"data: " + compact(last).encode() + b"\n\n"

    def _chunk(self, index: int, text: str, logprobs: str, finish: str) -> bytes:
        choice = (
            f',"choices":[{{"index":{index},"text":{compact(text)},'
            f'"logprobs":{logprobs},"finish_reason":{finish}}}]'
        )
        return self._chunk_head + choice.encode() + self._chunk_tail
