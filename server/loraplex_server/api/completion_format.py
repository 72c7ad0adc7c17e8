"""Answers of `POST /v1/completions`, complete and streamed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraplex_scheduler.plan import SampledToken, TokenLogprobs
from loraplex_server.api.answer import OpenAIStreamEnd, Written
from loraplex_server.api.best_of import best_samples
from loraplex_server.api.completion_schemas import CompletionBody
from loraplex_server.api.front import unix_time
from loraplex_server.api.job import Job
from loraplex_server.api.json_text import compact
from loraplex_server.api.logprobs import CompletionLogprobs, prompt_logprobs, prompt_tokens
from loraplex_server.api.stream_chunk import ChunkWriter
from loraplex_server.api.usage import Usage
from loraplex_server.text.assembler import TextDelta
from loraplex_server.text.vocabulary import Vocabulary


class CompletionFormat(OpenAIStreamEnd):
    """Implements `AnswerFormat` in the shape of `text_completion`."""

    def __init__(self, job: Job, body: CompletionBody, vocabulary: Vocabulary) -> None:
        self._job = job
        self._body = body
        self._vocabulary = vocabulary
        self._envelope = {
            "id": job.job_id,
            "object": "text_completion",
            "created": unix_time(),
            "model": job.model,
        }
        self._chunks = ChunkWriter(job, body, self._envelope)
        self._echoes = self._echoed() if body.echo else None
        self._logprobs: list[CompletionLogprobs] | None = None
        if body.logprobs is not None:
            self._logprobs = [self._logprob_writer() for _ in range(job.num_sequences)]
        # What a stream has of each prompt until the first token comes, which goes out with it.
        self._prompts: dict[int, list[TokenLogprobs]] | None = None
        if body.echoes_logprobs:
            self._prompts = {index: [] for index in range(job.num_sequences)}
        self._unnamed = set(range(job.num_sequences)) if body.return_token_ids else set()

    def complete(self, sequences: list[Written], usage: Usage) -> dict[str, Any]:
        """See `AnswerFormat`."""
        num_kept = self._body.num_kept
        if self._job.n > num_kept:
            sequences = best_samples(sequences, num_drawn=self._job.n, num_kept=num_kept)
        choices = [
            self._choice(index, index // num_kept, written)
            for index, written in enumerate(sequences)
        ]
        return {
            **self._envelope,
            "choices": choices,
            "usage": usage,
            "metrics": usage.metrics,
        }

    def _choice(self, index: int, which: int, written: Written) -> dict[str, Any]:
        """Return choice `index`, of prompt `which`."""
        prompt = self._job.prompts[which]
        tokens = [] if self._job.is_prompt_only else written.tokens
        text = "" if self._job.is_prompt_only else written.text
        choice: dict[str, Any] = {
            "index": index,
            "text": self._echoes[which] + text if self._echoes else text,
            "logprobs": None,
            "finish_reason": "length" if self._job.is_prompt_only else written.finish_reason,
            "stop_reason": None if self._job.is_prompt_only else written.stop_reason,
        }
        if self._logprobs is not None:
            head = prompt_tokens(prompt, written.prompt_logprobs) if self._prompts else []
            choice["logprobs"] = self._logprobs[index].write([*head, *tokens])
        if self._body.prompt_logprobs is not None:
            given = prompt_logprobs(self._vocabulary, prompt, written.prompt_logprobs)
            choice["prompt_logprobs"] = given
        if self._body.return_token_ids:
            choice["token_ids"] = [token.token_id for token in tokens]
            choice["prompt_token_ids"] = prompt
        return choice

    def stream_head(self) -> bytes:
        """See `AnswerFormat`."""
        if self._echoes is None or self._prompts is not None:
            return b""  # with log probabilities, the prompt comes when they do
        indexes = range(self._job.num_sequences)
        return b"".join([self._chunk(i, self._echo(i), "null", "null", ()) for i in indexes])

    def stream_delta(self, index: int, delta: TextDelta) -> bytes:
        """See `AnswerFormat`."""
        if self._prompts is not None and index in self._prompts:
            self._prompts[index] += delta.prompt_logprobs
            if delta.tokens or delta.finish_reason is not None:
                return self._prompt_chunk(index) + self._delta_chunk(index, delta)
            return b""
        return self._delta_chunk(index, delta)

    def _delta_chunk(self, index: int, delta: TextDelta) -> bytes:
        is_shown = not self._job.is_prompt_only
        tokens = delta.tokens if is_shown else []
        text = delta.text if is_shown else ""
        logprobs = "null"
        if self._logprobs is not None and tokens:
            logprobs = compact(self._logprobs[index].write(tokens))
        elif not text and delta.finish_reason is None and not self._body.return_token_ids:
            return b""
        finish = "null"
        if delta.finish_reason is not None:
            reason = delta.finish_reason.value if is_shown else "length"
            finish = f'"{reason}","stop_reason":{compact(delta.stop_reason)}'
        if is_shown:
            self._chunks.count(index, delta)
        return self._chunk(index, text, logprobs, finish, tokens)

    def stream_tail(self, usage: Usage) -> bytes:
        """See `AnswerFormat`."""
        return self._chunks.last(usage)

    def _prompt_chunk(self, index: int) -> bytes:
        """Return the chunk with the prompt and its log probabilities."""
        assert self._prompts is not None
        assert self._logprobs is not None
        prompt = self._job.prompts[index // self._job.n]
        tokens = prompt_tokens(prompt, self._prompts.pop(index))
        logprobs = compact(self._logprobs[index].write(tokens))
        return self._chunk(index, self._echo(index), logprobs, "null", ())

    def _chunk(
        self, index: int, text: str, logprobs: str, finish: str, tokens: Sequence[SampledToken]
    ) -> bytes:
        choice = (
            f'{{"index":{index},"text":{compact(text)},'
            f'"logprobs":{logprobs},"finish_reason":{finish}'
        )
        if self._body.return_token_ids:
            choice += f',"token_ids":{compact([token.token_id for token in tokens])}'
            if index in self._unnamed:
                self._unnamed.discard(index)
                choice += f',"prompt_token_ids":{compact(self._job.prompts[index // self._job.n])}'
        return self._chunks.chunk(index, choice + "}")

    def _echo(self, index: int) -> str:
        assert self._echoes is not None
        return self._echoes[index // self._job.n]

    def _echoed(self) -> list[str]:
        """Return each prompt as its answers repeat it: as it was sent, if nothing was cut off."""
        decode = self._vocabulary.decoder(skip_special_tokens=self._job.text.skip_special_tokens)
        is_whole = self._body.truncate_prompt_tokens is None
        pairs = zip(self._body.prompt, self._job.prompts, strict=True)
        return [
            sent if isinstance(sent, str) and is_whole else decode(token_ids)
            for sent, token_ids in pairs
        ]

    def _logprob_writer(self) -> CompletionLogprobs:
        return CompletionLogprobs(
            self._vocabulary,
            skip_special_tokens=self._job.text.skip_special_tokens,
            as_ids=bool(self._body.return_tokens_as_token_ids),
        )
