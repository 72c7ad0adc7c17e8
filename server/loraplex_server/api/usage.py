"""How many tokens an answer cost."""

from __future__ import annotations

from collections.abc import Sequence


def usage_of(prompts: Sequence[Sequence[int]], num_generated: int) -> dict[str, int]:
    """Return OpenAI's `usage`: each prompt counts once, however many samples it has."""
    num_prompt = sum(len(prompt) for prompt in prompts)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
    }
