"""Fuzz uploads for as long as you like: `python tests/server/adapters/run_fuzz.py --inputs 100000`.

Bound by the CPU: one input takes some milliseconds, most of them its making, unpacking and reading.
Prints every kind of defect when it is found, then a table of what came of the inputs; the last
line is JSON. An input is made again by its seed and index: `--seed 0 --first 4711 --inputs 1`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch

from tests.support.fuzz_corpus import make_corpus
from tests.support.fuzz_uploads import (
    Outcome,
    UploadFuzzer,
    bounded_process,
    enter,
    peak_bytes,
    resident_bytes,
)


@dataclass
class Tally:
    """What came of all inputs so far."""

    kinds: Counter[str] = field(default_factory=Counter)
    faults: dict[str, list[int]] = field(default_factory=dict)
    cpu_s: float = 0.0
    slowest: tuple[float, int] = (0.0, -1)

    def add(self, index: int, outcome: Outcome) -> None:
        self.kinds[outcome.kind] += 1
        self.cpu_s += outcome.cpu_s
        self.slowest = max(self.slowest, (outcome.cpu_s, index))
        if outcome.fault is not None:
            where = outcome.fault.partition(": ")[0]
            if where not in self.faults:
                print(f"input {index}: {outcome.fault}", flush=True)
            self.faults.setdefault(where, []).append(index)


def run(first: int, num_inputs: int, seed: int, minutes: float) -> Tally:
    tally, begin = Tally(), time.perf_counter()
    corpus = make_corpus()
    with tempfile.TemporaryDirectory() as folder, bounded_process():
        root = Path(folder, "root")
        root.mkdir()
        fuzzer = UploadFuzzer(corpus, root, seed)
        enter(root)
        before, begin = resident_bytes(), time.perf_counter()
        for index in range(first, first + num_inputs):
            tally.add(index, fuzzer.feed(index))
            if time.perf_counter() - begin > 60 * minutes:
                break
        fuzzer.close()
    report(tally, seed, first, time.perf_counter() - begin, before)
    return tally


def report(tally: Tally, seed: int, first: int, wall_s: float, before: int) -> None:
    total = sum(tally.kinds.values())
    for kind, count in tally.kinds.most_common():
        print(f"{kind:20} {count:9,} {100 * count / total:6.2f} %")
    numbers = {
        "seed": seed,
        "first": first,
        "inputs": total,
        "outcomes": dict(tally.kinds.most_common()),
        "faults": {fault: len(indexes) for fault, indexes in tally.faults.items()},
        "inputs_per_s": round(total / wall_s, 1),
        "cpu_ms_mean": round(1000 * tally.cpu_s / total, 2),
        "cpu_s_max": round(tally.slowest[0], 2),
        "slowest_input": tally.slowest[1],
        "resident_mib_before": before >> 20,
        "resident_mib_peak": peak_bytes() >> 20,
    }
    for name, value in numbers.items():
        print(f"{name:20} {value}")
    print(json.dumps(numbers))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="index of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after so long")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tally = run(options.first, options.inputs, options.seed, options.minutes)
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
