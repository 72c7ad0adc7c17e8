"""`POST /v1/chat/completions`: a conversation in, the assistant's next message out."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from loraplex_server.api.answer import OpenAIStreamEnd, Written
from loraplex_server.api.chat_schemas import ChatBody
from loraplex_server.api.dialogue import Dialogue
from loraplex_server.api.dialogues import Dialogues
from loraplex_server.api.front import new_id, unix_time
from loraplex_server.api.job import Job
from loraplex_server.api.json_text import compact
from loraplex_server.api.logprobs import chat_logprobs
from loraplex_server.api.usage import Usage
from loraplex_server.text.assembler import TextDelta
from loraplex_server.text.tool_pieces import (
    AnswerParts,
    Call,
    CallArguments,
    CallStart,
    Content,
    Piece,
    Reasoning,
)
from loraplex_server.text.vocabulary import Vocabulary


def chat_router(dialogues: Dialogues) -> APIRouter:
    """Return the endpoint."""
    router = APIRouter()
    front = dialogues.front

    @router.post("/v1/chat/completions", tags=["generation"], response_model=None)
    async def create_chat_completion(body: ChatBody, request: Request) -> Response:
        """Answer the conversation, `n` times."""
        dialogue = dialogues.begin(body)
        return await front.answer(
            body,
            request,
            dialogue.wish(),
            new_id("chatcmpl"),
            lambda job: ChatFormat(job, body, front.vocabulary, dialogue),
        )

    return router


class ChatFormat(OpenAIStreamEnd):
    """Implements `AnswerFormat` in the shapes of `chat.completion` and its chunks."""

    def __init__(
        self, job: Job, body: ChatBody, vocabulary: Vocabulary, dialogue: Dialogue
    ) -> None:
        self._job = job
        self._vocabulary = vocabulary
        self._has_logprobs = bool(body.logprobs)
        self._includes_usage = body.includes_usage
        self._prefix = dialogue.prefix
        self._deltas = [_ChoiceDeltas(dialogue) for _ in range(job.num_sequences)]
        self._envelope = {"id": job.job_id, "created": unix_time(), "model": job.model}
        chunk = {**self._envelope, "object": "chat.completion.chunk"}
        self._chunk_head = b"data: " + compact(chunk).encode()[:-1]
        self._chunk_tail = b',"usage":null}\n\n' if self._includes_usage else b"}\n\n"

    def complete(self, sequences: list[Written], usage: Usage) -> dict[str, Any]:
        """See `AnswerFormat`."""
        choices = []
        for index, written in enumerate(sequences):
            parts = AnswerParts(content=self._prefix)
            parts.add(self._deltas[index].read(written.text, is_last=True))
            choices.append(
                {
                    "index": index,
                    "message": _message(parts),
                    "logprobs": self._logprobs_of(written),
                    "finish_reason": _finish_reason(written.finish_reason, bool(parts.calls)),
                    "stop_reason": written.stop_reason,
                }
            )
        return {**self._envelope, "object": "chat.completion", "choices": choices, "usage": usage}

    def stream_head(self) -> bytes:
        """See `AnswerFormat`."""
        content = compact(self._prefix)
        role = f'{{"role":"assistant","content":{content},"refusal":null}}'
        chunks = [self._chunk(i, role, "null", "null") for i in range(self._job.num_sequences)]
        return b"".join(chunks)

    def stream_delta(self, index: int, delta: TextDelta) -> bytes:
        """See `AnswerFormat`."""
        choice = self._deltas[index]
        is_last = delta.finish_reason is not None
        shown = choice.write(delta.text, is_last=is_last) if delta.text or is_last else []
        has_logprobs = self._has_logprobs and bool(delta.tokens)
        if has_logprobs and not shown:
            shown = ['{"content":""}']
        chunks = b""
        for position, content in enumerate(shown):
            is_first = has_logprobs and position == 0
            logprobs = compact(self._logprobs_of(delta)) if is_first else "null"
            chunks += self._chunk(index, content, logprobs, "null")
        if delta.finish_reason is not None:
            reason = _finish_reason(delta.finish_reason.value, choice.num_calls > 0)
            finish = f'"{reason}","stop_reason":{compact(delta.stop_reason)}'
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


class _ChoiceDeltas:
    """One choice's text as the deltas of its chunks."""

    def __init__(self, dialogue: Dialogue) -> None:
        self._reader = dialogue.reader()
        self.num_calls = 0

    def read(self, text: str, *, is_last: bool) -> list[Piece]:
        """Return what the next text is made of."""
        if self._reader is None:
            return [Content(text)]
        return self._reader.push(text, is_last=is_last)

    def write(self, text: str, *, is_last: bool) -> list[str]:
        """Return the JSON of the deltas that the next text makes."""
        if self._reader is None:
            return [f'{{"content":{compact(text)}}}'] if text else []
        return [self._delta(piece) for piece in self._reader.push(text, is_last=is_last)]

    def _delta(self, piece: Piece) -> str:
        if isinstance(piece, Content):
            return f'{{"content":{compact(piece.text)}}}'
        if isinstance(piece, Reasoning):
            return f'{{"reasoning":{compact(piece.text)}}}'
        if isinstance(piece, CallStart):
            self.num_calls += 1
        index = self.num_calls - 1
        if isinstance(piece, CallArguments):
            return compact(
                {"tool_calls": [{"index": index, "function": {"arguments": piece.text}}]}
            )
        call = {"index": index, **_call(Call(piece.call_id, piece.name))}
        return compact({"tool_calls": [call]})


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.call_id, "type": "function", "function": function}


def _message(parts: AnswerParts) -> dict[str, Any]:
    content = parts.content if parts.content or not parts.calls else None
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if parts.reasoning:
        message["reasoning"] = parts.reasoning
    if parts.calls:
        message["tool_calls"] = [_call(call) for call in parts.calls]
    return message


def _finish_reason(reason: str, has_calls: bool) -> str:
    """A call that was cut off by the length is no call to make."""
    return "tool_calls" if has_calls and reason == "stop" else reason
