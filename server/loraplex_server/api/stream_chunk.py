"""The chunks of OpenAI's streams: what begins and ends each, whatever the choice in it."""

from __future__ import annotations

from typing import Any, Final

from loraplex_server.api.job import Job
from loraplex_server.api.json_text import compact
from loraplex_server.api.schemas import GenerationBody
from loraplex_server.api.usage import Usage
from loraplex_server.text.assembler import TextDelta

_NO_USAGE: Final = b',"usage":null}\n\n'


class ChunkWriter:
    """Writes chunks around choices; made for one answer.

    Call `count` with each delta before the chunks that it becomes: with `continuous_usage_stats`
    they carry the usage of their choice so far.
    """

    def __init__(self, job: Job, body: GenerationBody, envelope: dict[str, Any]) -> None:
        """Write chunks that begin with `envelope`: `id`, `object`, `created` and `model`."""
        self._job = job
        self._envelope = envelope
        self._head = b"data: " + compact(envelope).encode()[:-1]
        self._includes_usage = body.includes_usage
        self._num_tokens = [0] * job.num_sequences if body.has_running_usage else None
        self._tail = _NO_USAGE if self._includes_usage else b"}\n\n"

    def count(self, index: int, delta: TextDelta) -> None:
        """Book the tokens of a delta of sequence `index`."""
        if self._num_tokens is not None:
            self._num_tokens[index] += len(delta.tokens)

    def chunk(self, index: int, choice: str, extra: str = "") -> bytes:
        """Return one chunk.

        Args:
            index: of the sequence.
            choice: the JSON of the one choice.
            extra: JSON beside `choices`, such as `,"prompt_token_ids":[1]`.
        """
        body = f',"choices":[{choice}]{extra}'.encode()
        return self._head + body + (self._tail if self._num_tokens is None else self._usage(index))

    def last(self, usage: Usage) -> bytes:
        """Return the chunk after all choices, with usage and metrics; empty if nobody asked."""
        if not self._includes_usage:
            return b""
        fields = {**self._envelope, "choices": [], "usage": usage, "metrics": usage.metrics}
        return b"data: " + compact(fields).encode() + b"\n\n"

    def _usage(self, index: int) -> bytes:
        assert self._num_tokens is not None
        num_prompt = len(self._job.prompts[index // self._job.n])
        num_generated = self._num_tokens[index]
        usage = {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
        }
        return b',"usage":' + compact(usage).encode() + b"}\n\n"
