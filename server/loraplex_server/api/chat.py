"""`POST /v1/chat/completions`: a conversation in, the assistant's next message out."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from loraplex_server.api.answer import OpenAIStreamEnd, Written
from loraplex_server.api.chat_schemas import ChatBody
from loraplex_server.api.dialogue import Dialogue
from loraplex_server.api.dialogues import Dialogues
from loraplex_server.api.front import new_id, unix_time
from loraplex_server.api.job import Job
from loraplex_server.api.json_text import compact
from loraplex_server.api.logprobs import chat_logprobs, prompt_logprobs
from loraplex_server.api.stream_chunk import ChunkWriter
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

_CHUNK: Final = "chat.completion.chunk"
_LOGPROBS: Final = ',"logprobs":'


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
            new_id("chatcmpl", body.request_id),
            lambda job: ChatFormat(job, body, front.vocabulary, dialogue),
        )

    return router


class ChatFormat(OpenAIStreamEnd):
    """Implements `AnswerFormat` in the shapes of `chat.completion` and its chunks."""

    def __init__(
        self, job: Job, body: ChatBody, vocabulary: Vocabulary, dialogue: Dialogue
    ) -> None:
        self._job = job
        self._body = body
        self._vocabulary = vocabulary
        self._prefix = dialogue.prefix
        # At once: what the dialogue knows of a model holds until it is encoded for another.
        self._deltas = [_ChoiceDeltas(dialogue) for _ in range(job.num_sequences)]
        self._envelope = {"id": job.job_id, "created": unix_time(), "model": job.model}
        self._chunks = ChunkWriter(job, body, {**self._envelope, "object": _CHUNK})

    def complete(self, sequences: list[Written], usage: Usage) -> dict[str, Any]:
        """See `AnswerFormat`."""
        choices = [self._choice(index, written) for index, written in enumerate(sequences)]
        answer = {**self._envelope, "object": "chat.completion", "choices": choices}
        prompt = self._job.prompts[0]
        if self._body.prompt_logprobs is not None:
            given = prompt_logprobs(self._vocabulary, prompt, sequences[0].prompt_logprobs)
            answer["prompt_logprobs"] = given
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = prompt
        return {**answer, "usage": usage, "metrics": usage.metrics}

    def stream_head(self) -> bytes:
        """See `AnswerFormat`."""
        content = compact(self._prefix)
        role = f'{{"role":"assistant","content":{content},"refusal":null}}'
        extra = ""
        if self._body.return_token_ids:
            extra = f',"prompt_token_ids":{compact(self._job.prompts[0])}'
        chunks = [self._chunk(i, role, extra=extra) for i in range(self._job.num_sequences)]
        return b"".join(chunks)

    def stream_delta(self, index: int, delta: TextDelta) -> bytes:
        """See `AnswerFormat`."""
        choice = self._deltas[index]
        is_last = delta.finish_reason is not None
        shown = choice.write(delta.text, is_last=is_last) if delta.text or is_last else []
        # What belongs to tokens goes with the first chunk that the tokens make, text or not.
        of_tokens = self._of_tokens(delta)
        if of_tokens and not shown:
            shown = ['{"content":""}']
        self._chunks.count(index, delta)
        chunks = b""
        for content in shown:
            chunks += self._chunk(index, content, of_tokens=of_tokens)
            of_tokens = ""
        if delta.finish_reason is not None:
            reason = _finish_reason(delta.finish_reason.value, choice.num_calls > 0)
            finish = f'"{reason}","stop_reason":{compact(delta.stop_reason)}'
            chunks += self._chunk(index, "{}", finish=finish)
        return chunks

    def stream_tail(self, usage: Usage) -> bytes:
        """See `AnswerFormat`."""
        return self._chunks.last(usage)

    def _choice(self, index: int, written: Written) -> dict[str, Any]:
        parts = AnswerParts(content=self._prefix)
        parts.add(self._deltas[index].read(written.text, is_last=True))
        choice = {
            "index": index,
            "message": _message(parts),
            "logprobs": self._logprobs(written) if self._body.logprobs else None,
            "finish_reason": _finish_reason(written.finish_reason, bool(parts.calls)),
            "stop_reason": written.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = [token.token_id for token in written.tokens]
        return choice

    def _of_tokens(self, delta: TextDelta) -> str:
        """Return the JSON of a choice that tells of the tokens themselves, if anybody asked."""
        if not delta.tokens:
            return ""
        shown = f',"logprobs":{compact(self._logprobs(delta))}' if self._body.logprobs else ""
        if self._body.return_token_ids:
            shown += f',"token_ids":{compact([token.token_id for token in delta.tokens])}'
        return shown

    def _logprobs(self, part: Written | TextDelta) -> dict[str, Any]:
        as_ids = bool(self._body.return_tokens_as_token_ids)
        return chat_logprobs(self._vocabulary, part.tokens, as_ids=as_ids)

    def _chunk(
        self, index: int, delta: str, *, of_tokens: str = "", finish: str = "null", extra: str = ""
    ) -> bytes:
        logprobs = of_tokens if of_tokens.startswith(_LOGPROBS) else f"{_LOGPROBS}null{of_tokens}"
        choice = f'{{"index":{index},"delta":{delta}{logprobs},"finish_reason":{finish}}}'
        return self._chunks.chunk(index, choice, extra)


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
