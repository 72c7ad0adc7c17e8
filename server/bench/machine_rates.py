"""What this machine can do: bytes and bfloat16 products per second, with all threads.

These are the floors that decode steps are held against: at one request a step reads every weight
once; at 32 the products count. A process of its own, so that no threads stay behind in the caller.

    python server/bench/machine_rates.py        # one JSON line
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch

_BYTES = 1_000_000_000
_ROWS, _SIZE = 256, 2048
_PASSES = 8
#: No pass starts later; torch has no fast bfloat16 product for a processor without AVX-512.
_LIMIT_S = 5.0


def measure() -> dict[str, Any]:
    """Return the best of several passes each; rates per second."""
    numbers = torch.ones(_BYTES // 4)
    left = torch.randn(_ROWS, _SIZE).bfloat16()
    right = torch.randn(_SIZE, _SIZE).bfloat16()
    return {
        "threads": torch.get_num_threads(),
        "bytes_per_s": _BYTES / _best_s(lambda: numbers.sum()),
        "bf16_flops": 2 * _ROWS * _SIZE**2 / _best_s(lambda: left @ right),
    }


def _best_s(call: Callable[[], object]) -> float:
    times: list[float] = []
    deadline = time.perf_counter() + _LIMIT_S
    while not times or (len(times) < _PASSES and time.perf_counter() < deadline):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    print(json.dumps(measure()))
