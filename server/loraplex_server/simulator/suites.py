"""What S-LoRA published, row by row (req/s), and the workload behind each row.

Table 3 of arXiv 2311.03285 with the repository's result files, and the rows of its ablations. All
rows: alpha 1, cv 1, lengths U[8, 512), seed 42; throughput counts the time to drain the queue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: Tokens of the pool on an A100-80G as published, by setting.
POOL_TOKENS: Final = {"S1": 125_000, "S2": 125_000, "S4": 65_000}

#: And on smaller devices; the A10G's is between 14,000 and 15,000.
SMALL_POOL_TOKENS: Final = {"a10g": 14_500, "a100-40g": 14_000}


@dataclass(frozen=True)
class PublishedRow:
    """One measurement of S-LoRA on one device."""

    table: str
    hardware: str
    setting: str
    num_adapters: int
    rate: float
    duration_s: float
    requests_per_s: float

    @property
    def pool_tokens(self) -> int:
        return SMALL_POOL_TOKENS.get(self.hardware) or POOL_TOKENS[self.setting]


def _rows(
    table: str,
    hardware: str,
    setting: str,
    rate: float,
    duration_s: float,
    published: dict[int, float],
) -> list[PublishedRow]:
    return [
        PublishedRow(table, hardware, setting, num, rate, duration_s, value)
        for num, value in published.items()
    ]


PUBLISHED: Final[tuple[PublishedRow, ...]] = (
    *_rows("table 3", "a100-80g", "S1", 10, 120, {5: 8.05, 100: 7.99, 1000: 7.64, 2000: 7.61}),
    *_rows("table 3", "a100-80g", "S2", 10, 120, {5: 7.48, 100: 7.29, 1000: 6.69, 2000: 6.71}),
    # The paper prints 3.96 for n=1000, which is a run at R = 6 over 300 s; this is the one at 10.
    *_rows("table 3", "a100-80g", "S4", 10, 120, {2: 4.49, 100: 4.28, 1000: 3.90}),
    *_rows("table 3", "a100-80g", "S4", 6, 300, {1000: 3.96}),
    *_rows("ablation", "a100-80g", "S2", 10, 300, {0: 9.641, 1: 7.737, 20: 7.926, 200: 7.517}),
    *_rows("ablation", "a100-80g", "S4", 6, 300, {0: 5.586, 1: 4.429, 100: 4.301, 400: 4.056}),
    *_rows("ablation", "a100-40g", "S4", 2, 300, {0: 1.821, 1: 1.671, 20: 1.523, 200: 1.408}),
    *_rows("ablation", "a10g", "S1", 2, 300, {1: 1.831, 20: 1.812, 200: 1.775}),
    *_rows("ablation", "a10g", "S2", 2, 300, {1: 1.744, 20: 1.680, 200: 1.576}),
    *_rows("saturation", "a10g", "S2", 2.5, 300, {0: 1.996, 1: 1.878, 200: 1.517}),
)
