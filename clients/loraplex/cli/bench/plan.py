"""Which requests are to be made, and when. Pure, and the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from loraplex.errors import UsageError


@dataclass(frozen=True)
class Ask:
    """One request to be made.

    Attributes:
        at_s: When it arrives, in seconds from the start; None as soon as a worker is free.
        prompt_len: Tokens of the prompt.
        output_len: Tokens of the answer.
    """

    at_s: float | None
    model: str
    prompt_len: int
    output_len: int


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens, all alike from `low` to `high`."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Read "128" or "64-256".

        Raises:
            UsageError: It is neither.
        """
        low, _, high = text.partition("-")
        if not (low.isdigit() and (high.isdigit() or not high)):
            raise UsageError(f"a length is a number or a range such as 64-256, not {text!r}")
        lengths = cls(int(low), int(high or low))
        if not 1 <= lengths.low <= lengths.high:
            raise UsageError(f"a length is at least 1, and a range goes up, unlike {text!r}")
        return lengths

    def draw(self, rng: random.Random) -> int:
        """Draw one."""
        return rng.randint(self.low, self.high)


class Popularity:
    """Which model a request goes to: the model of rank `i` with weight `1 / i ** exponent` (Zipf).

    An exponent of 0 treats all alike.
    """

    def __init__(self, models: Sequence[str], exponent: float) -> None:
        self._models = list(models)
        weights = (1.0 / rank**exponent for rank in range(1, len(models) + 1))
        self._cumulated = list(accumulate(weights))

    def draw(self, rng: random.Random) -> str:
        """Draw one."""
        return rng.choices(self._models, cum_weights=self._cumulated)[0]


def arrival_times(rate: float, cv: float, rng: random.Random) -> Iterator[float]:
    """Yield arrivals without end, in seconds: gaps are Gamma-distributed with mean `1 / rate`.

    Args:
        rate: Arrivals per second.
        cv: The gaps' coefficient of variation; 1 is a Poisson process, 0 a steady one.
        rng: What draws them.
    """
    at_s = 0.0
    while True:
        yield at_s
        at_s += rng.gammavariate(cv**-2, cv**2 / rate) if cv else 1.0 / rate


def drawn_asks(
    popularity: Popularity,
    prompt_lens: Lengths,
    output_lens: Lengths,
    times: Iterator[float] | None,
    rng: random.Random,
) -> Iterator[Ask]:
    """Yield requests without end, at the times given, or whenever a worker is free."""
    while True:
        yield Ask(
            None if times is None else next(times),
            popularity.draw(rng),
            prompt_lens.draw(rng),
            output_lens.draw(rng),
        )
