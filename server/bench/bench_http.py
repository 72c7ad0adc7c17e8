"""What HTTP costs outside of the engine: the API process over an engine that computes nothing.

A stub core in the engine process emits one token per stream and step at a fixed pace; everything
else is the product's own: the engine process's loop, the messages between the processes, the
application, the web server. Figures are CPU microseconds of the whole API process per token (all
streams open, none beginning or ending), its CPU microseconds per request (answers of one token, in
a closed loop of 8), and the milliseconds from a token's emission to its arrival at the client.

What bounds it: at least one `send` of the operating system per token and stream, 5 to 10 us, since
each stream has a connection of its own. Python comes on top. On a machine of two cores all of it is
time that the engine's threads do not have.

    python server/bench/bench_http.py [--streams 1 8 32 256] [--seconds 5] [--pace-ms 20]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from started_server import started_server
from stub_engine import EmitLog
from synthetic_adapters import write_adapter

from loraplex import Client
from loraplex_server.model.loader import load_spec
from loraplex_server.model.source import resolve_model

_HERE = Path(__file__).parent
#: From when all streams have begun to when the measurement begins, and as much after its end.
_MARGIN_S = 1.0
_PROMPT = "Tell me, in a few words and without any flourish, what a page table is good for. " * 3
#: Requests follow each other without waiting for a step.
_FAST_PACE_MS = 2.0


def main() -> None:
    options = parse_options()
    rows = []
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as name:
        folder = Path(name)
        if options.streams:
            with server(folder, options.pace_ms) as api:
                for num_streams in options.streams:
                    rows.append(api.measure_streams(num_streams, options))
                    print(json.dumps(rows[-1]), flush=True)
        if options.requests:
            with server(folder, _FAST_PACE_MS) as api:
                adapter = push_adapter(folder, api.base_url)
                for arm, wish in request_arms(adapter).items():
                    rows.append(api.measure_requests(arm, wish, options))
                    print(json.dumps(rows[-1]), flush=True)
    report(rows, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 8, 32, 256])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--pace-ms", type=float, default=20.0, help="from step to step")
    parser.add_argument("--requests", type=int, default=400, help="of each arm; 0: none")
    return parser.parse_args()


def request_arms(adapter: str) -> dict[str, dict[str, object]]:
    """Return what to ask, by the name of the arm."""
    common = {"max_tokens": 1, "stream": True, "temperature": 0}
    base = {"path": "/v1/completions", "body": {"model": "", "prompt": _PROMPT, **common}}
    named = {"model": adapter, "prompt": _PROMPT, **common}
    messages = [{"role": "user", "content": _PROMPT}]
    return {
        "completion": base,
        "completion, new connection": {**base, "is_reused": False},
        "completion, adapter": {"path": "/v1/completions", "body": named},
        "chat": {
            "path": "/v1/chat/completions",
            "body": {"model": "", "messages": messages, **common},
        },
    }


class Api:
    """A running server over a stub engine, and its process."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log_path: Path) -> None:
        self.base_url = f"http://127.0.0.1:{port}"
        self._pid = process.pid
        self._port = port
        self._log_path = log_path
        self._log = EmitLog(log_path)
        self._base = resolve_model(None).name

    def measure_streams(self, num_streams: int, options: argparse.Namespace) -> dict[str, object]:
        """Run so many streams; measure while all of them run."""
        per_s = 1e3 / options.pace_ms
        body = {
            "model": self._base,
            "stream": True,
            "ignore_eos": True,
            "max_tokens": int((options.seconds + 3 * _MARGIN_S) * per_s),
        }
        wish = {"port": self._port, "path": "/v1/completions", "body": body}
        client = self._client(wish, "--streams", str(num_streams))
        deadline = time.monotonic() + 60
        while self._log.num_live < num_streams and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(_MARGIN_S)
        engine_pid = self._engine_pid()
        before = self._log.totals, cpu_s(self._pid), cpu_s(engine_pid), time.perf_counter()
        time.sleep(options.seconds)
        after = self._log.totals, cpu_s(self._pid), cpu_s(engine_pid), time.perf_counter()
        found = self._result(client)
        tokens, steps, outside_ns = (b - a for a, b in zip(before[0], after[0], strict=True))
        return {
            "streams": num_streams,
            "api_us_per_token": round(1e6 * (after[1] - before[1]) / tokens, 1),
            "api_core_share": round((after[1] - before[1]) / (after[3] - before[3]), 3),
            "tokens_per_s": round(tokens / (after[3] - before[3])),
            "engine_us_outside_step": round(outside_ns / 1e3 / steps, 1),
            "engine_cpu_us_per_step": round(1e6 * (after[2] - before[2]) / steps, 1),
            **{key: round(value, 2) for key, value in found.items()},
        }

    def measure_requests(
        self, arm: str, wish: dict[str, object], options: argparse.Namespace
    ) -> dict[str, object]:
        """Run short requests in a closed loop, after a few to warm up."""
        body = wish["body"]
        assert isinstance(body, dict)
        wish = {"port": self._port, **wish, "body": {**body, "model": body["model"] or self._base}}
        self._result(self._client(wish, "--requests", "40"))
        before = cpu_s(self._pid)
        found = self._result(self._client(wish, "--requests", str(options.requests)))
        us = 1e6 * (cpu_s(self._pid) - before) / options.requests
        per_s = options.requests / found["wall_s"]
        return {"arm": arm, "api_us_per_request": round(us), "requests_per_s": round(per_s)}

    def _client(self, wish: dict[str, object], *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(_HERE / "sse_client.py"), "--log", str(self._log_path)]
        command += ["--wish", json.dumps(wish), *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE)

    def _result(self, client: subprocess.Popen[bytes]) -> dict[str, float]:
        output, _ = client.communicate(timeout=120)
        if client.returncode:
            raise SystemExit("the client failed")
        found: dict[str, float] = json.loads(output)
        return found

    def _engine_pid(self) -> int:
        """Return the child that has mapped the log."""
        children = Path(f"/proc/{self._pid}/task/{self._pid}/children").read_text().split()
        for pid in map(int, children):
            if str(self._log_path) in Path(f"/proc/{pid}/maps").read_text():
                return pid
        raise SystemExit("no engine process")


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of another process, of all its threads."""
    return time.clock_gettime((~pid << 3) | 2)  # MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED)


def push_adapter(folder: Path, base_url: str) -> str:
    source = resolve_model(None)
    path = folder / "adapter"
    write_adapter(path, load_spec(source).geometry, rank=8, seed=1, base_name=source.name)
    Client(base_url=base_url).adapters.push(path, name="bench")
    return "bench"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(folder: Path, pace_ms: float) -> Iterator[Api]:
    """Run the API process and its stub engine while the block runs."""
    port = free_port()
    log_path = folder / "emitted"
    command = [sys.executable, str(_HERE / "stub_server.py"), "--log", str(log_path)]
    command += ["--pace-s", str(pace_ms / 1e3), "--port", str(port), "--max-running", "512"]
    command += ["--data-dir", str(folder / "data")]
    base_url = f"http://127.0.0.1:{port}"
    with started_server(command, base_url, folder / "server.log", limit_s=60) as process:
        yield Api(process, port, log_path)


def report(rows: list[dict[str, object]], options: argparse.Namespace) -> None:
    """Print the tables and one JSON line."""
    print(
        "\n| streams | tokens/s | API us/token | API, of a core | late p50 / p99 / max ms |", end=""
    )
    print(" tokens/event | engine us outside a step |\n|--:|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        if "streams" in row:
            print(
                f"| {row['streams']} | {row['tokens_per_s']} | {row['api_us_per_token']} "
                f"| {row['api_core_share']:.1%} | {row['p50_ms']} / {row['p99_ms']} / "
                f"{row['max_ms']} | {row['tokens_per_event']} | {row['engine_us_outside_step']} |"
            )
    print("\n| request | API us | requests/s |\n|---|--:|--:|")
    for row in rows:
        if "arm" in row:
            print(f"| {row['arm']} | {row['api_us_per_request']} | {row['requests_per_s']} |")
    print("\n" + json.dumps(environment(options) | {"rows": rows}))


def environment(options: argparse.Namespace) -> dict[str, object]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "benchmark": "bench_http",
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "pace_ms": options.pace_ms,
        "versions": {name: version(name) for name in ("loraplex", "fastapi", "uvicorn")},
    }


if __name__ == "__main__":
    main()
