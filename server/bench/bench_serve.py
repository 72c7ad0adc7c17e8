"""Closed loop over HTTP: base, one adapter, distinct adapters, against PEFT's mixed batch.

"distinct" hands 32 adapters out in turn, so that no two requests in flight use the same one.

What bounds it on a CPU: at one request the bytes of the weights, at 32 the matrix products of the
base; 32 distinct adapters of mean rank 30 on q, k, v and o add about as many bytes again as the
base has. Arms take turns in every repeat, so that a noisy machine hurts them alike; medians over
the repeats; ratios first.

    python server/bench/bench_serve.py [--repeats 3] [--dtype bfloat16] [--skip-peft]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from http_load import run_closed_loop
from peft_baseline import PeftMixedBatch
from started_server import started_server
from synthetic_adapters import write_adapter
from workload import make_work, summarize

from loraplex import Client
from loraplex_server.model.loader import load_spec
from loraplex_server.model.source import resolve_model

RANKS = (8, 16, 32, 64)
NUM_ADAPTERS = 32
#: Requests per run and concurrency: two rounds at 32.
NUM_REQUESTS = {1: 8, 8: 32, 32: 64}


@dataclass(frozen=True)
class Arm:
    """One thing to measure. `num_adapters` 0 is the base model."""

    name: str
    num_adapters: int
    concurrency: int
    is_peft: bool = False


def arms(concurrencies: list[int], with_peft: bool) -> list[Arm]:
    found = []
    for c in concurrencies:
        found += [Arm("base", 0, c), Arm("1 adapter", 1, c), Arm("distinct", NUM_ADAPTERS, c)]
    if with_peft:
        found.append(Arm("PEFT mixed batch", NUM_ADAPTERS, 32, is_peft=True))
    return found


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as name:
        folder = Path(name)
        source = resolve_model(None)
        adapters = [folder / "adapters" / f"a{i:02d}" for i in range(NUM_ADAPTERS)]
        geometry = load_spec(source).geometry
        for i, path in enumerate(adapters):
            rank = RANKS[i % len(RANKS)]
            write_adapter(path, geometry, rank=rank, seed=i, base_name=source.name)
        todo = arms(options.concurrency, not options.skip_peft)
        peft = None
        if not options.skip_peft:
            peft = PeftMixedBatch(source.path, adapters, getattr(torch, options.dtype))
        with server(folder, options) as base_url:
            client = Client(base_url=base_url)
            for path in adapters:
                client.adapters.push(path)
            results = measure(todo, options.repeats, base_url, source.name, adapters, peft)
    report(results, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--skip-peft", action="store_true")
    return parser.parse_args()


@contextmanager
def server(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """Run `loraplex serve` while the block runs."""
    command = [sys.executable, "-m", "loraplex_server", "--port", str(options.port)]
    command += ["--data-dir", str(folder / "data"), "--dtype", options.dtype]
    base_url = f"http://127.0.0.1:{options.port}"
    with started_server(command, base_url, folder / "server.log", limit_s=300):
        yield base_url


def measure(
    todo: list[Arm],
    repeats: int,
    base_url: str,
    base: str,
    adapters: list[Path],
    peft: PeftMixedBatch | None,
) -> dict[Arm, list[dict[str, float]]]:
    """Run every arm once per repeat, in turns, after an untimed round of both systems."""
    names = [path.name for path in adapters]
    warm_up = make_work(NUM_ADAPTERS, NUM_ADAPTERS, seed=999)
    run_closed_loop(base_url, warm_up, names, base, 32)
    if peft is not None:
        peft.run(warm_up[:4], 4)
    results: dict[Arm, list[dict[str, float]]] = {arm: [] for arm in todo}
    for repeat in range(repeats):
        for arm in todo:
            work = make_work(NUM_REQUESTS[arm.concurrency], arm.num_adapters, seed=repeat)
            if arm.is_peft:
                assert peft is not None
                timings, wall_s = peft.run(work, arm.concurrency)
            else:
                timings, wall_s = run_closed_loop(base_url, work, names, base, arm.concurrency)
            results[arm].append(summarize(timings, wall_s))
            rate = results[arm][-1]["out_tok_s"]
            print(f"  repeat {repeat + 1}: c={arm.concurrency:<3} {arm.name:<24} {rate:7.1f} tok/s")
    return results


def report(results: dict[Arm, list[dict[str, float]]], options: argparse.Namespace) -> None:
    """Print the ratios, the table and one JSON line."""
    medians = {
        arm: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for arm, runs in results.items()
    }
    rate = {(arm.name, arm.concurrency): m["out_tok_s"] for arm, m in medians.items()}
    ratios = {}
    for c in options.concurrency:
        ratios[f"1 adapter / base, c={c}"] = rate["1 adapter", c] / rate["base", c]
        ratios[f"distinct adapters / base, c={c}"] = rate["distinct", c] / rate["base", c]
    if not options.skip_peft and 32 in options.concurrency:
        peft = rate["PEFT mixed batch", 32]
        ratios["distinct adapters / PEFT mixed batch, c=32"] = rate["distinct", 32] / peft
    print("\n| ratio of output tokens per second | |\n|---|--:|")
    for name, value in ratios.items():
        print(f"| {name} | {value:.2f} |")
    print("\n| arm | in flight | out tok/s | TTFT p50 / p99 ms | inter-token p50 / p99 ms |")
    print("|---|--:|--:|--:|--:|")
    for arm, m in medians.items():
        print(
            f"| {arm.name} | {arm.concurrency} | {m['out_tok_s']:.1f} "
            f"| {m['ttft_p50_ms']:.0f} / {m['ttft_p99_ms']:.0f} "
            f"| {m['itl_p50_ms']:.1f} / {m['itl_p99_ms']:.1f} |"
        )
    print("\n" + json.dumps(environment(options) | {"ratios": ratios, "arms": as_rows(medians)}))


def as_rows(medians: dict[Arm, dict[str, float]]) -> list[dict[str, object]]:
    return [
        {"arm": arm.name, "concurrency": arm.concurrency}
        | {key: round(value, 2) for key, value in m.items()}
        for arm, m in medians.items()
    ]


def environment(options: argparse.Namespace) -> dict[str, object]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "benchmark": "bench_serve",
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "dtype": options.dtype,
        "repeats": options.repeats,
        "versions": {name: version(name) for name in ("loraplex", "torch", "transformers", "peft")},
    }


if __name__ == "__main__":
    main()
