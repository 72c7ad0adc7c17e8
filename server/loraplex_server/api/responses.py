"""`POST /v1/responses`: OpenAI's newer endpoint, without its memory: nothing is stored."""

from __future__ import annotations

import math
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from loraplex_server.api.answer import Written
from loraplex_server.api.dialogue import Dialogue
from loraplex_server.api.dialogues import Dialogues
from loraplex_server.api.error_table import error_body
from loraplex_server.api.front import unix_time
from loraplex_server.api.ids import new_item_id
from loraplex_server.api.job import Job
from loraplex_server.api.json_text import compact
from loraplex_server.api.logprobs import chat_logprobs
from loraplex_server.api.responses_output import Event, OutputItems
from loraplex_server.api.responses_schemas import ResponsesBody
from loraplex_server.api.translated import as_chat
from loraplex_server.api.usage import Usage
from loraplex_server.text.assembler import TextDelta
from loraplex_server.text.tool_pieces import Content, Piece, Reasoning
from loraplex_server.text.vocabulary import Vocabulary


def responses_router(dialogues: Dialogues) -> APIRouter:
    """Return the endpoint."""
    router = APIRouter()
    front = dialogues.front

    @router.post("/v1/responses", tags=["generation"], response_model=None)
    async def create_response(body: ResponsesBody, request: Request) -> Response:
        """Answer the conversation once."""
        chat = as_chat(body)
        dialogue = dialogues.begin(chat)
        return await front.answer(
            chat,
            request,
            dialogue.wish(),
            new_item_id("resp"),
            lambda job: ResponsesFormat(job, body, front.vocabulary, dialogue),
        )

    return router


class ResponsesFormat:
    """Implements `AnswerFormat` in the shapes of `response` and its events; of one sequence."""

    stream_end: Final = b""

    def __init__(
        self, job: Job, body: ResponsesBody, vocabulary: Vocabulary, dialogue: Dialogue
    ) -> None:
        self._vocabulary = vocabulary
        self._has_logprobs = body.has_logprobs
        self._reader = dialogue.reader()
        self._items = OutputItems()
        self._reasoning = ""
        self._num_events = 0
        self._finish_reason = ""
        self._response = {
            "id": job.job_id,
            "object": "response",
            "created_at": unix_time(),
            "model": job.model,
            **_echoed(body, job),
        }

    def complete(self, sequences: list[Written], usage: Usage) -> dict[str, Any]:
        """See `AnswerFormat`."""
        written = sequences[0]
        delta = TextDelta(text=written.text, tokens=written.tokens)
        self._push(delta, is_last=True)
        self._finish_reason = written.finish_reason
        self._items.close(is_complete=self._is_complete)
        return self._finished(usage)

    def stream_head(self) -> bytes:
        """See `AnswerFormat`."""
        begun = {**self._response, "status": "in_progress", "output": [], "usage": None}
        kinds = ("response.created", "response.in_progress")
        return self._events([{"type": kind, "response": begun} for kind in kinds])

    def stream_delta(self, index: int, delta: TextDelta) -> bytes:
        """See `AnswerFormat`."""
        is_last = delta.finish_reason is not None
        events = self._push(delta, is_last=is_last)
        if delta.finish_reason is not None:
            self._finish_reason = delta.finish_reason.value
            events += self._items.close(is_complete=self._is_complete)
        return self._events(events)

    def stream_tail(self, usage: Usage) -> bytes:
        """See `AnswerFormat`."""
        response = self._finished(usage)
        return self._events([{"type": f"response.{response['status']}", "response": response}])

    def stream_error(self, error: Exception) -> bytes:
        """See `AnswerFormat`: the event that says why, then the response as it stands."""
        shown = error_body(error)["error"]
        why = {"type": "error", "code": shown["code"], "message": shown["message"]}
        failed = {
            **self._response,
            "status": "failed",
            "error": {"code": "server_error", "message": shown["message"]},
            "output": self._items.output,
            "usage": None,
        }
        return self._events(
            [{**why, "param": shown["param"]}, {"type": "response.failed", "response": failed}]
        )

    @property
    def _is_complete(self) -> bool:
        return self._finish_reason != "length"

    def _push(self, delta: TextDelta, *, is_last: bool) -> list[Event]:
        pieces: list[Piece]
        if self._reader is None:
            pieces = [Content(delta.text)] if delta.text else []
        else:
            pieces = self._reader.push(delta.text, is_last=is_last)
            thoughts = [piece.text for piece in pieces if isinstance(piece, Reasoning)]
            self._reasoning += "".join(thoughts)
        logprobs: list[Any] = []
        if self._has_logprobs:
            logprobs = chat_logprobs(self._vocabulary, delta.tokens)["content"]
        return self._items.push(pieces, logprobs)

    def _finished(self, usage: Usage) -> dict[str, Any]:
        status = "completed" if self._is_complete else "incomplete"
        thoughts = self._vocabulary.encode(self._reasoning, add_special_tokens=False)
        num_reasoning = min(len(thoughts), usage["completion_tokens"])
        why = None if self._is_complete else {"reason": "max_output_tokens"}
        return {
            **self._response,
            "status": status,
            "completed_at": unix_time(),
            "incomplete_details": why,
            "output": self._items.output,
            "usage": _usage(usage, num_reasoning=num_reasoning),
        }

    def _events(self, events: list[Event]) -> bytes:
        lines = []
        for event in events:
            shown = compact({**event, "sequence_number": self._num_events})
            self._num_events += 1
            lines.append(f"event: {event['type']}\ndata: {shown}\n\n".encode())
        return b"".join(lines)


def _echoed(body: ResponsesBody, job: Job) -> dict[str, Any]:
    """Return what a response says of its request."""
    sampling = job.sampling
    sent = body.model_dump(mode="json", by_alias=True, exclude_unset=True)
    text_format = {"type": "text"} | ((sent.get("text") or {}).get("format") or {})
    return {
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": sampling.temperature if math.isfinite(sampling.temperature) else None,
        "text": {"format": text_format},
        "tool_choice": sent.get("tool_choice") or "auto",
        "tools": [
            {"strict": False, "parameters": None, **tool} for tool in sent.get("tools") or ()
        ],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _usage(usage: Usage, *, num_reasoning: int) -> dict[str, Any]:
    num_cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": num_cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": num_reasoning},
        "total_tokens": usage["total_tokens"],
    }
