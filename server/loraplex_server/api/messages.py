"""`POST /v1/messages` and its `count_tokens`: conversations as Anthropic's clients have them."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from loraplex_server.api.answer import Written
from loraplex_server.api.dialogue import Dialogue
from loraplex_server.api.dialogues import Dialogues
from loraplex_server.api.error_table import error_body, shape_of
from loraplex_server.api.foreign_errors import foreign_error
from loraplex_server.api.ids import new_item_id
from loraplex_server.api.job import Job
from loraplex_server.api.json_text import compact
from loraplex_server.api.messages_output import Event, OutputBlocks
from loraplex_server.api.messages_schemas import CountBody, MessagesBody
from loraplex_server.api.translated import as_chat
from loraplex_server.api.usage import Usage
from loraplex_server.text.assembler import TextDelta
from loraplex_server.text.tool_pieces import Content

_PATH: Final = "/v1/messages"


def messages_router(dialogues: Dialogues) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter(tags=["generation"])
    front = dialogues.front

    @router.post(_PATH, response_model=None)
    async def create_message(body: MessagesBody, request: Request) -> Response:
        """Answer the conversation once."""
        chat = as_chat(body)
        dialogue = dialogues.begin(chat)
        return await front.answer(
            chat,
            request,
            dialogue.wish(),
            new_item_id("msg"),
            lambda job: MessagesFormat(job, dialogue),
        )

    @router.post(f"{_PATH}/count_tokens")
    async def count_tokens(body: CountBody, request: Request) -> dict[str, int]:
        """Count the tokens of the prompt that the conversation would make."""
        chat = as_chat(body)
        prompts, _ = await front.encode(chat.model_wish, dialogues.begin(chat).wish(), request)
        return {"input_tokens": sum(map(len, prompts))}

    return router


class MessagesFormat:
    """Implements `AnswerFormat` in the shapes of Anthropic's `message`; of one sequence."""

    stream_end: Final = b""

    def __init__(self, job: Job, dialogue: Dialogue) -> None:
        self._job = job
        self._reader = dialogue.reader()
        self._blocks = OutputBlocks()
        self._end = Written()  # of the stream: how it ended

    def complete(self, sequences: list[Written], usage: Usage) -> dict[str, Any]:
        """See `AnswerFormat`."""
        written = sequences[0]
        self._push(written.text, is_last=True)
        self._blocks.close()
        message = {**self._message(), "content": self._blocks.content}
        return {**message, **self._ending(written), "usage": _usage(usage)}

    def stream_head(self) -> bytes:
        """See `AnswerFormat`."""
        usage = _shown_usage(num_prompt=self._job.num_prompt_tokens, num_cached=0, num_generated=0)
        return _events([{"type": "message_start", "message": {**self._message(), "usage": usage}}])

    def stream_delta(self, index: int, delta: TextDelta) -> bytes:
        """See `AnswerFormat`."""
        is_last = delta.finish_reason is not None
        events = self._push(delta.text, is_last=is_last)
        if is_last:
            self._end.add(delta)
            events += self._blocks.close()
        return _events(events)

    def stream_tail(self, usage: Usage) -> bytes:
        """See `AnswerFormat`."""
        ending = {"delta": self._ending(self._end), "usage": _usage(usage)}
        return _events([{"type": "message_delta", **ending}, {"type": "message_stop"}])

    def stream_error(self, error: Exception) -> bytes:
        """See `AnswerFormat`."""
        status = shape_of(type(error)).status
        _, body = foreign_error(_PATH, status, error_body(error)["error"])
        return _events([body])

    def _push(self, text: str, *, is_last: bool) -> list[Event]:
        if self._reader is None:
            return self._blocks.push([Content(text)] if text else [])
        return self._blocks.push(self._reader.push(text, is_last=is_last))

    def _message(self) -> dict[str, Any]:
        return {
            "id": self._job.job_id,
            "type": "message",
            "role": "assistant",
            "model": self._job.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _ending(self, written: Written) -> dict[str, Any]:
        sequence = written.stop_reason if isinstance(written.stop_reason, str) else None
        if written.finish_reason == "length":
            reason = "max_tokens"
        elif self._blocks.has_calls:
            reason = "tool_use"
        else:
            reason = "end_turn" if sequence is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": sequence}


def _events(events: list[Event]) -> bytes:
    lines = [f"event: {event['type']}\ndata: {compact(event)}\n\n" for event in events]
    return "".join(lines).encode()


def _usage(usage: Usage) -> dict[str, Any]:
    return _shown_usage(
        num_prompt=usage["prompt_tokens"],
        num_cached=usage["prompt_tokens_details"]["cached_tokens"],
        num_generated=usage["completion_tokens"],
    )


def _shown_usage(*, num_prompt: int, num_cached: int, num_generated: int) -> dict[str, Any]:
    """Return `usage`, whose `input_tokens` are those that no cache held."""
    return {
        "input_tokens": num_prompt - num_cached,
        "cache_read_input_tokens": num_cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": num_generated,
    }
