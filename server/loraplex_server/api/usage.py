"""How many tokens an answer cost."""

from __future__ import annotations

from typing import Any

Usage = dict[str, Any]


def make_usage(*, num_prompt: int, num_generated: int, num_cached: int) -> Usage:
    """Return OpenAI's `usage`.

    Args:
        num_prompt: tokens of all prompts, each counted once however many samples it has.
        num_generated: tokens of all samples.
        num_cached: prompt tokens that the prefix cache held, counted as `num_prompt` counts.
    """
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
