"""Answers of LoRAX's `/generate` and `/generate_stream`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from loraplex_scheduler.plan import SampledToken
from loraplex_server.api.answer import Written
from loraplex_server.api.best_of import best_samples
from loraplex_server.api.error_table import error_body, shape_of
from loraplex_server.api.foreign_errors import foreign_error
from loraplex_server.api.job import Job
from loraplex_server.api.json_text import compact
from loraplex_server.api.logprobs import prompt_tokens, shown_logprob
from loraplex_server.api.lorax_schemas import LoraxBody
from loraplex_server.api.sampling import sequence_sampling
from loraplex_server.api.usage import Usage
from loraplex_server.text.assembler import TextDelta
from loraplex_server.text.vocabulary import Vocabulary


class LoraxFormat:
    """Implements `AnswerFormat` in LoRAX's shapes; of one prompt."""

    stream_end: Final = b""

    def __init__(
        self, job: Job, body: LoraxBody, vocabulary: Vocabulary, *, has_details: bool
    ) -> None:
        self._job = job
        self._body = body
        self._vocabulary = vocabulary
        self._has_details = has_details
        self._written = Written()

    def complete(self, sequences: list[Written], usage: Usage) -> dict[str, Any]:
        """See `AnswerFormat`."""
        num_drawn = len(sequences)
        seeds = {id(w): self._seed(index) for index, w in enumerate(sequences)}
        best, *others = best_samples(sequences, num_drawn=num_drawn, num_kept=num_drawn)
        body: dict[str, Any] = {"generated_text": self._full_text(best)}
        if self._has_details:
            body["details"] = self._whole(best, seeds[id(best)])
            if others:
                body["details"]["best_of_sequences"] = [
                    {"generated_text": self._full_text(w), **self._whole(w, seeds[id(w)])}
                    for w in others
                ]
        return body

    def stream_head(self) -> bytes:
        """See `AnswerFormat`."""
        return b""

    def stream_delta(self, index: int, delta: TextDelta) -> bytes:
        """See `AnswerFormat`: the texts of all events together are the text, as clients join them.

        Text that was held back comes with the token that let it go, and the others' is empty.
        """
        self._written.add(delta)
        events = []
        for position, token in enumerate(delta.tokens, start=1):
            is_last = position == len(delta.tokens)
            is_end = is_last and delta.finish_reason is not None
            event = {
                "token": self._token(token, delta.text if is_last else ""),
                "generated_text": self._written.text if is_end else None,
                "details": self._details(self._written, self._seed(0)) if is_end else None,
            }
            events.append(b"data:" + compact(event).encode() + b"\n\n")
        return b"".join(events)

    def stream_tail(self, usage: Usage) -> bytes:
        """See `AnswerFormat`."""
        return b""

    def stream_error(self, error: Exception) -> bytes:
        """See `AnswerFormat`."""
        status = shape_of(type(error)).status
        _, body = foreign_error("/generate_stream", status, error_body(error)["error"])
        return b"data:" + compact(body).encode() + b"\n\n"

    def _full_text(self, written: Written) -> str:
        return (self._body.inputs if self._body.parameters.return_full_text else "") + written.text

    def _whole(self, written: Written, seed: int | None) -> dict[str, Any]:
        """Return the details of one complete sequence."""
        prefill: Sequence[SampledToken] = ()
        if self._body.parameters.decoder_input_details:
            prefill = prompt_tokens(self._job.prompts[0], written.prompt_logprobs)
        return {
            **self._details(written, seed),
            "prefill": [self._plain(token) for token in prefill],
            "tokens": [self._token(token, self._text(token.token_id)) for token in written.tokens],
        }

    def _details(self, written: Written, seed: int | None) -> dict[str, Any]:
        reason = "length"
        if written.finish_reason == "stop":
            reason = "eos_token" if written.stop_reason is None else "stop_sequence"
        return {
            "finish_reason": reason,
            "prompt_tokens": self._job.num_prompt_tokens,
            "generated_tokens": len(written.tokens),
            "seed": seed,
        }

    def _seed(self, index: int) -> int | None:
        """Return the seed that sequence `index` drew with."""
        sampling = sequence_sampling(self._job.sampling, index)
        return None if sampling.is_greedy else sampling.seed

    def _plain(self, token: SampledToken) -> dict[str, Any]:
        logprob = shown_logprob(token.logprobs.logprob) if token.logprobs else None
        return {"id": token.token_id, "text": self._text(token.token_id), "logprob": logprob}

    def _token(self, token: SampledToken, text: str) -> dict[str, Any]:
        assert token.logprobs is not None, "the engine reports what the sampling asked for"
        shown = {
            **self._plain(token),
            "text": text,
            "special": token.token_id in self._vocabulary.special_ids,
        }
        if self._body.parameters.return_k_alternatives:
            shown["alternative_tokens"] = [
                {"id": i, "text": self._text(i), "logprob": shown_logprob(logprob)}
                for i, logprob in token.logprobs.top
            ]
        return shown

    def _text(self, token_id: int) -> str:
        return self._vocabulary.token_bytes(token_id).decode("utf-8", "replace")
