"""Closed loops over HTTP, ours beside other servers: the same requests, in one run, in turns.

What bounds it on a CPU: at one request the bytes of the weights; at 32 the products of the base;
and how a server runs requests of different adapters together. One server runs at a time. Every
repeat starts each server afresh and asks it for all cells; the order of the servers rotates, so
that a noisy machine hurts them alike. Results are appended to a file as they come, medians over the
repeats.

    python server/bench/bench_peers.py --adapters DIR --peers peers.toml --out results.jsonl
    python server/bench/bench_peers.py --report results.jsonl > report.md

`docs/benchmarks/cpu.md` tells how to install the others and what `peers.toml` holds.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cell_run import run_cell, run_cold, wait_for_silence, warm_up
from peer_adapters import register_adapters, weight_bytes, write_missing
from peer_cells import CELLS, OUR_CELLS, Cell
from peer_report import OURS, render
from peer_servers import Peer, PeerError, RunningServer, read_peers, running
from turn_lock import TurnLock

from loraplex_server.model.source import resolve_model

HERE = Path(__file__).parent
_CELL_LIMIT_S = 900
_HOLD_S = 165.0
_ATTEMPTS = 2
_SILENCE_LIMIT_S = 60.0
#: Fields of a record that are printed at once.
_SHOWN = (
    *("kind", "server", "repeat", "cell", "out_tok_s", "latency_p99_s", "failed", "mismatched"),
    *("other_cpu_share", "client_cpu_share", "pss_peak_mb", "extra_ttft_p50_ms", "error"),
)


@dataclass(frozen=True)
class Setting:
    """What all turns share. `write` keeps one record."""

    model: Path
    adapters: Path
    cold: int
    quiet_below: float
    logs: Path
    lock: TurnLock
    write: Callable[[dict[str, Any]], None]


def main() -> None:
    options = parse_options()
    # So that a server does not outlive a run that is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.report:
        print(render(read_records(options.report)))
        return
    model = resolve_model(options.model).path
    peers = read_peers(options.peers) if options.peers else []
    cells, our_cells = tuple(options.cells), (*options.cells, *options.our_cells)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as name:
        folder = Path(name)
        data_dir = options.data_dir or folder / "data"
        adapters = options.adapters or folder / "adapters"
        setting = Setting(
            model=model,
            adapters=adapters,
            cold=options.cold,
            quiet_below=options.quiet_below,
            logs=options.logs or folder,
            lock=TurnLock(options.lock, _HOLD_S),
            write=writer(options.out),
        )
        shared_cells = (*cells, *options.peft)
        write_missing(adapters, model, max((c.num_adapters for c in shared_cells), default=0))
        turns = [(ours(options, data_dir), our_cells), *((peer, cells) for peer in peers)]
        if not options.skip_ours:
            most = max((c.num_adapters for c in our_cells), default=0)
            register(turns[0][0], most, setting)
        else:
            turns = turns[1:]
        setting.write(environment(options, model))
        for repeat in range(options.first_repeat, options.first_repeat + options.repeats):
            run_repeat(repeat, turns, options.peft, setting)
    if options.out:
        print(render(read_records([options.out])))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--peers", type=Path, help="TOML file of the other servers")
    add("--peft", type=Cell.parse, nargs="*", default=(), help="cells for PEFT's mixed batch")
    add("--model", help="folder or GGUF file; default: the embedded model")
    add("--adapters", type=Path, help="folder of PEFT adapters a0000, ...; missing ones are made")
    add("--data-dir", type=Path, help="keep our registered adapters here")
    add("--flags", default="", help="more flags for our server, in one string")
    add("--port", type=int, default=8765)
    add("--cells", type=Cell.parse, nargs="*", default=CELLS, help="N:ADAPTERS[:ALPHA|:zipfEXP]")
    add("--our-cells", type=Cell.parse, nargs="*", default=OUR_CELLS, help="for our server only")
    add("--cold", type=int, default=0, help="adapters whose first use is timed, per start")
    add("--repeats", type=int, default=3)
    add("--first-repeat", type=int, default=0, help="seed of the first repeat")
    add("--quiet-below", type=float, default=0.25, help="cores that others may use; else again")
    add("--skip-ours", action="store_true")
    add("--out", type=Path, help="append one JSON line per result here")
    add("--logs", type=Path, help="keep the servers' logs in this folder")
    add("--lock", type=Path, help="flock(2) this file while measuring, for others to keep still")
    add("--report", type=Path, nargs="+", help="only print the report of recorded results")
    options = parser.parse_args()
    if options.logs:
        options.logs.mkdir(parents=True, exist_ok=True)
    return options


def ours(options: argparse.Namespace, data_dir: Path) -> Peer:
    """Return our own server as one of the comparison."""
    command = [sys.executable, "-m", "loraplex_server", "--port", str(options.port)]
    command += ["--data-dir", str(data_dir), "--served-model-name", "base"]
    if options.model:
        command += ["--model", options.model]
    command += shlex.split(options.flags)
    # A brace in a path would be read as a placeholder.
    text = shlex.join(command).replace("{", "{{").replace("}", "}}")
    return Peer(OURS, text, f"http://127.0.0.1:{options.port}")


def register(peer: Peer, num_adapters: int, setting: Setting) -> None:
    """Register what our data folder does not have yet, through our own API."""
    with (
        setting.lock.turn(),
        running(
            peer,
            0,
            model=setting.model,
            adapters=setting.adapters,
            log=setting.logs / "register.log",
        ),
    ):
        register_adapters(
            peer.base_url, setting.adapters, setting.model, num_adapters, setting.lock.breathe
        )


def run_repeat(
    repeat: int,
    turns: Sequence[tuple[Peer, Sequence[Cell]]],
    peft_cells: Sequence[Cell],
    setting: Setting,
) -> None:
    with setting.lock.turn():
        setting.lock.quiet()
        setting.write({"kind": "machine", "repeat": repeat} | machine_rates())
    first = repeat % len(turns) if turns else 0
    for peer, cells in (*turns[first:], *turns[:first]):
        for num_adapters, group in peer.groups(cells):
            try:
                run_turn(peer, num_adapters, group, repeat, setting)
            except PeerError as error:
                setting.write({"kind": "broken", "server": peer.name, "error": str(error)})
    run_peft(peft_cells, repeat, setting)


def run_turn(
    peer: Peer, num_adapters: int, cells: Sequence[Cell], repeat: int, setting: Setting
) -> None:
    """Start one server, run all its cells, and stop it."""
    log = setting.logs / f"{peer.name.replace('/', '-')}-{num_adapters}-{repeat}.log"
    about = {"server": peer.name, "repeat": repeat, "num_registered": num_adapters}
    started = time.monotonic()
    with (
        setting.lock.turn(),
        running(
            peer, num_adapters, model=setting.model, adapters=setting.adapters, log=log
        ) as server,
    ):
        setting.write({"kind": "start", "start_s": time.monotonic() - started} | about)
        setting.lock.quiet()
        warm_up(server)
        for cell in cells:
            run_until_quiet(server, cell, about, setting)
        unused = never_used(cells, num_adapters, repeat + 1)[: setting.cold]
        if unused:
            setting.lock.breathe()
            figures = run_cold(server, unused, repeat + 1, setting.adapters)
            setting.write({"kind": "cold"} | about | figures)


def run_until_quiet(
    server: RunningServer, cell: Cell, about: dict[str, Any], setting: Setting
) -> None:
    """Run one cell, and again with other prompts if something else took the processor."""
    for attempt in range(_ATTEMPTS):
        setting.lock.breathe()
        wait_for_silence(server, setting.quiet_below, _SILENCE_LIMIT_S)
        figures = run_cell(server, cell, about["repeat"] + 1, setting.adapters, attempt)
        is_quiet = figures["other_cpu_share"] <= setting.quiet_below
        kind = "cell" if is_quiet else "disturbed"
        setting.write({"kind": kind, "cell": cell.name} | about | figures)
        if is_quiet:
            return


def never_used(cells: Sequence[Cell], num_adapters: int, seed: int) -> list[int]:
    """Return adapters that are there and that no cell has asked for, the last ones first."""
    used = {item.adapter for cell in cells for item in cell.work(seed)}
    # Beyond these no adapter folder need exist that a server could load by a call.
    most = min(num_adapters, max((c.num_adapters for c in CELLS), default=0))
    return [index for index in reversed(range(most)) if index not in used]


def run_peft(cells: Sequence[Cell], repeat: int, setting: Setting) -> None:
    script = [sys.executable, str(HERE / "peft_cell.py"), "--model", str(setting.model)]
    script += ["--adapters", str(setting.adapters), "--seed", str(repeat + 1)]
    for cell in cells:
        about = {"server": "PEFT mixed batch", "repeat": repeat, "cell": cell.name}
        with setting.lock.turn():
            setting.lock.quiet()
            done = subprocess.run(
                [*script, "--cell", cell.name],
                capture_output=True,
                text=True,
                check=False,
                timeout=_CELL_LIMIT_S,
            )
        if done.returncode:
            setting.write({"kind": "broken", "error": done.stderr[-2000:]} | about)
        else:
            setting.write({"kind": "cell"} | about | json.loads(done.stdout.splitlines()[-1]))


def machine_rates() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(HERE / "machine_rates.py")], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def writer(out: Path | None) -> Callable[[dict[str, Any]], None]:
    """Return what keeps a record: in the file, and one short line for eyes."""

    def write(record: dict[str, Any]) -> None:
        rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()}
        if out:
            with out.open("a") as file:
                file.write(json.dumps(rounded) + "\n")
        print("  " + "  ".join(f"{k}={rounded[k]}" for k in _SHOWN if k in rounded), flush=True)

    return write


def read_records(paths: Sequence[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def environment(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE,
    )
    cpus = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith(("model name", "cpu family"))
    ]
    return {
        "kind": "environment",
        "commit": commit.stdout.strip(),
        "model": model.name,
        "weight_bytes": weight_bytes(model),
        "flags": options.flags,
        "machine": f"{platform.machine()}, {cpus[1] if len(cpus) > 1 else '?'}",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
