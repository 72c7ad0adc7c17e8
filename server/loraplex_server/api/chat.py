"""`POST /v1/chat/completions`: a conversation in, the assistant's next message out."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from loraplex_server.api.answer import OpenAIStreamEnd, Written
from loraplex_server.api.chat_schemas import ChatBody
from loraplex_server.api.front import Front, Wish, new_id, unix_time
from loraplex_server.api.job import Job
from loraplex_server.api.json_text import compact
from loraplex_server.api.logprobs import chat_logprobs
from loraplex_server.api.prompts import PromptEncoder
from loraplex_server.api.usage import Usage
from loraplex_server.text.assembler import TextDelta
from loraplex_server.text.vocabulary import Vocabulary


def chat_router(front: Front) -> APIRouter:
    """Return the endpoint."""
    router = APIRouter()

    @router.post("/v1/chat/completions", tags=["generation"], response_model=None)
    async def create_chat_completion(body: ChatBody, request: Request) -> Response:
        """Answer the conversation, `n` times."""
        job_id = new_id("chatcmpl")
        return await front.answer(
            body,
            request,
            chat_wish(body),
            job_id,
            lambda job: ChatFormat(job, body, front.vocabulary),
        )

    return router


def chat_wish(body: ChatBody) -> Wish:
    messages = [message.for_template() for message in body.messages]

    def encode(encoder: PromptEncoder) -> list[list[int]]:
        # The template writes the special tokens itself; the tokenizer's would be a second set.
        add_special_tokens = bool(body.add_special_tokens)
        return [
            encoder.encode_chat(
                messages, body.chat_template_kwargs, add_special_tokens=add_special_tokens
            )
        ]

    max_tokens = body.max_completion_tokens
    return Wish(
        num_prompts=1,
        num_chars=sum(len(message["content"]) for message in messages),
        encode=encode,
        max_tokens=body.max_tokens if max_tokens is None else max_tokens,
        default_tokens=None,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        is_chat=True,
    )


class ChatFormat(OpenAIStreamEnd):
    """Implements `AnswerFormat` in the shapes of `chat.completion` and its chunks."""

    def __init__(self, job: Job, body: ChatBody, vocabulary: Vocabulary) -> None:
        self._job = job
        self._vocabulary = vocabulary
        self._has_logprobs = bool(body.logprobs)
        self._includes_usage = body.includes_usage
        self._envelope = {"id": job.job_id, "created": unix_time(), "model": job.model}
        chunk = {**self._envelope, "object": "chat.completion.chunk"}
        self._chunk_head = b"data: " + compact(chunk).encode()[:-1]
        self._chunk_tail = b',"usage":null}\n\n' if self._includes_usage else b"}\n\n"

    def complete(self, sequences: list[Written], usage: Usage) -> dict[str, Any]:
        """See `AnswerFormat`."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": written.text, "refusal": None},
                "logprobs": self._logprobs_of(written),
                "finish_reason": written.finish_reason,
                "stop_reason": written.stop_reason,
            }
            for index, written in enumerate(sequences)
        ]
        return {**self._envelope, "object": "chat.completion", "choices": choices, "usage": usage}

    def stream_head(self) -> bytes:
        """See `AnswerFormat`."""
        role = '{"role":"assistant","content":"","refusal":null}'
        chunks = [self._chunk(i, role, "null", "null") for i in range(self._job.num_sequences)]
        return b"".join(chunks)

    def stream_delta(self, index: int, delta: TextDelta) -> bytes:
        """See `AnswerFormat`."""
        has_logprobs = self._has_logprobs and bool(delta.tokens)
        if not (delta.text or has_logprobs or delta.finish_reason):
            return b""
        chunks = b""
        if delta.text or has_logprobs:
            logprobs = compact(self._logprobs_of(delta)) if has_logprobs else "null"
            content = f'{{"content":{compact(delta.text)}}}'
            chunks = self._chunk(index, content, logprobs, "null")
        if delta.finish_reason is not None:
            reason = f'"{delta.finish_reason.value}"'
            finish = f'{reason},"stop_reason":{compact(delta.stop_reason)}'
            chunks += self._chunk(index, "{}", "null", finish)
        return chunks

    def stream_tail(self, usage: Usage) -> bytes:
        """See `AnswerFormat`."""
        if not self._includes_usage:
            return b""
        chunk = {**self._envelope, "object": "chat.completion.chunk", "choices": []}
        return b"data: " + compact({**chunk, "usage": usage}).encode() + b"\n\n"

    def _logprobs_of(self, part: Written | TextDelta) -> dict[str, Any] | None:
        return chat_logprobs(self._vocabulary, part.tokens) if self._has_logprobs else None

    def _chunk(self, index: int, delta: str, logprobs: str, finish: str) -> bytes:
        choice = (
            f',"choices":[{{"index":{index},"delta":{delta},'
            f'"logprobs":{logprobs},"finish_reason":{finish}}}]'
        )
        return self._chunk_head + choice.encode() + self._chunk_tail
