"""Prompts of so many tokens, for a tokenizer that only the server knows.

They are drawn from common words, which most vocabularies have as one token each. How many tokens a
word takes there is measured, by two prompts: `tokens = fixed + per_word * words`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_WORDS = tuple(
    word
    for line in (
        "the of and to in is you that it he was for on are as with his they at be this have from",
        "or one had by word but not what all were we when your can said there use an each which",
        "she do how their if will up other about out many then them these so some her would make",
        "like him into time has look two more write go see number no way could people my than",
        "first water been call who oil its now find long down day did get come made may part",
    )
    for word in line.split()
)

#: Words of the two prompts that are measured.
PROBES = (16, 80)


@dataclass(frozen=True)
class PromptMaker:
    """Makes prompts; `fixed` and `per_word` are tokens."""

    fixed: float
    per_word: float

    @classmethod
    def fit(cls, counts: tuple[int, int]) -> PromptMaker:
        """Return what fits the numbers of tokens that the server counted in the probes."""
        per_word = max((counts[1] - counts[0]) / (PROBES[1] - PROBES[0]), 0.01)
        return cls(counts[0] - per_word * PROBES[0], per_word)

    def make(self, num_tokens: int, rng: random.Random) -> str:
        """Return a prompt of about so many tokens, unlike all others from its start on."""
        return words(max(1, round((num_tokens - self.fixed) / self.per_word)), rng)


def words(count: int, rng: random.Random) -> str:
    """Return so many words."""
    return " ".join(rng.choices(_WORDS, k=count))
