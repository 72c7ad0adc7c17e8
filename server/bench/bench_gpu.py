"""The GPU path against what bounds it and against what others do: `make bench-gpu`.

Four sections, each with its own share of `--minutes`; what no time is left for is left out and
named, never hurried.

1. Limits: copy bandwidth, matrix rate, cost of a launch. All else is a share of these.
2. Kernels: LoRA sites against four baselines and the bytes that must move; attention; elementwise.
3. Decode steps through the engine's runner, with CUDA graphs.
4. Closed loop through the engine core: base, 1 to 2000 adapters, and PEFT.

Needs torch, triton, transformers, safetensors and numpy; PEFT is compared with where it is
installed. Arms take turns, medians, data larger than the cache. Tables, then one line of JSON.

    python3 server/bench/bench_gpu.py [--minutes 7.5] [--sections limits kernels steps serving]

`--dry-run` walks through everything in tiny sizes on a CPU, under the Triton interpreter, to find
the script's own mistakes; it prints no results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("limits", "kernels", "steps", "serving")


def main() -> int:
    """Run and return the exit status: 1 if something broke, 2 without a GPU.

    Whether targets are met does not matter to it.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    for folder in ("server", "scheduler", "memory", "kernels", "kernels/bench", "server/bench"):
        sys.path.insert(0, str(ROOT / folder))
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined: before any import
    import torch
    from bench_gpu_report import targets_table
    from bench_gpu_run import Bench, Budget

    if not args.dry_run and not torch.cuda.is_available():
        print("no CUDA device here: nothing to measure (--dry-run tries the script out)")
        return 2
    if args.dry_run:
        print("DRY RUN on a CPU, kernels interpreted: the times below mean nothing")
    device = torch.device("cpu") if args.dry_run else torch.device("cuda", 0)
    started = time.monotonic()
    bench = Bench(device, Budget(started, 60 * args.minutes), is_dry=args.dry_run)
    bench.run(args.sections)
    print("\n" + targets_table(bench.results))
    head = _head(device, time.monotonic() - started)
    if args.dry_run:
        print(f"dry run ended after {head['seconds']} s; its times mean nothing")
        results = {"notes": bench.results.notes, "failures": bench.results.failures}
    else:
        results = bench.results.as_json()
    print(json.dumps({**head, **results}))
    return 1 if bench.results.failures else 0


def _head(device: Any, seconds: float) -> dict[str, Any]:
    """Return what identifies a run."""
    import torch
    import triton

    is_cuda = device.type == "cuda"
    return {
        "bench": "gpu",
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if is_cuda else "none (dry run)",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "seconds": round(seconds, 1),
    }


def _commit() -> str | None:
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
