"""How many tokens an answer cost, and how long its parts took."""

from __future__ import annotations

from typing import Any


class Usage(dict[str, Any]):
    """OpenAI's `usage`, as JSON shows it.

    Attributes:
        metrics: the times of the same answer, for formats that show them; see `Timings`.
    """

    def __init__(self, fields: dict[str, Any], metrics: dict[str, Any]) -> None:
        super().__init__(fields)
        self.metrics = metrics


def make_usage(
    *, num_prompt: int, num_generated: int, num_cached: int, metrics: dict[str, Any] | None = None
) -> Usage:
    """Return OpenAI's `usage`.

    Args:
        num_prompt: tokens of all prompts, each counted once however many samples it has.
        num_generated: tokens of all samples.
        num_cached: prompt tokens that the prefix cache held, counted as `num_prompt` counts.
    """
    fields = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
    return Usage(fields, metrics or {})


def add_usages(usages: list[Usage], metrics: dict[str, Any]) -> Usage:
    """Return what several parts of one answer cost together."""
    return make_usage(
        num_prompt=sum(usage["prompt_tokens"] for usage in usages),
        num_generated=sum(usage["completion_tokens"] for usage in usages),
        num_cached=sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages),
        metrics=metrics,
    )
