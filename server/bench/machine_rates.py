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
_SIZE = 2048
_PASSES = 8


def measure() -> dict[str, Any]:
    """Return the best of several passes each; rates per second."""
    numbers = torch.ones(_BYTES // 4)
    left, right = torch.randn(2, _SIZE, _SIZE).bfloat16()
    return {
        "threads": torch.get_num_threads(),
        "bytes_per_s": _BYTES / _best_s(lambda: numbers.sum()),
        "bf16_flops": 2 * _SIZE**3 / _best_s(lambda: left @ right),
    }


def _best_s(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_PASSES):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    print(json.dumps(measure()))
