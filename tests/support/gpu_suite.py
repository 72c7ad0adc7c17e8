"""Every kernel and engine check, compiled, on a GPU: `make test-gpu`, or this file with `python3`.

Needs torch, triton, transformers, safetensors and numpy; no pytest, no network, no installation.
Checks run in several processes that share the device, since compiling is most of the work. A check
that hangs, or that leaves the device in error, costs its process and nothing more: the next check
gets a fresh one. The last line is JSON; the status is 0 when all passed, 1 when any did not, and 2
where there is no CUDA device.

    python3 tests/support/gpu_suite.py [--minutes 8] [--group lora ...] [--match zipf] [--jobs 6]

`--device cpu` runs the same checks under the Triton interpreter, to try out the script itself.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import queue
import selectors
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: Where each group's list of `(name, check(device))` is.
GROUPS = {
    "lora": ("tests.support.lora_checks", "LORA_CHECKS"),
    "halves": ("tests.support.half_checks", "HALF_CHECKS"),
    "attention": ("tests.support.attention_checks", "ATTENTION_CHECKS"),
    "elementwise": ("tests.support.elementwise_checks", "ELEMENTWISE_CHECKS"),
    "sampling": ("tests.support.sampling_checks", "SAMPLING_CHECKS"),
    "scatter": ("tests.support.scatter_checks", "SCATTER_CHECKS"),
    "engine": ("tests.support.engine_gpu_checks", "ENGINE_CHECKS"),
}


def add_source_roots() -> None:
    """Make the packages of this tree importable, installed or not."""
    for folder in ("server", "scheduler", "memory", "kernels", "clients", ""):
        sys.path.insert(0, str(ROOT / folder))
    # `tests` has no __init__.py, and some wheel's stray `tests` package would hide it.
    tests = types.ModuleType("tests")
    tests.__path__ = [str(ROOT / "tests")]
    sys.modules["tests"] = tests


@dataclass
class Outcome:
    """How one check ended: passed, failed, or not run for lack of time."""

    group: str
    name: str
    status: str
    seconds: float = 0.0
    detail: str = ""


@dataclass
class Run:
    """What the threads share: the checks still to do, and how the others ended."""

    device: str
    check_timeout_s: float
    deadline: float
    todo: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    outcomes: list[Outcome] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, outcome: Outcome) -> None:
        """Record and print one outcome."""
        with self.lock:
            self.outcomes.append(outcome)
            label = f"{outcome.group}: {outcome.name}"
            print(f"{outcome.status:<7} {outcome.seconds:>6.1f} s  {label}", flush=True)
            if outcome.detail:
                print("    " + outcome.detail.strip().replace("\n", "\n    "), flush=True)


class Worker:
    """One process that runs checks by name; replaced after a hang, a crash or a device error."""

    def __init__(self, device: str) -> None:
        self._stderr = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  closed in `close`
        env = dict(os.environ)
        if device == "cpu":
            env["TRITON_INTERPRET"] = "1"
        else:
            env.pop("TRITON_INTERPRET", None)
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", "--device", device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=env,
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)

    def run(self, group: str, name: str, timeout_s: float) -> tuple[dict, bool]:
        """Run one check; its reply, and whether this process can take another."""
        try:
            self._process.stdin.write(json.dumps([group, name]).encode() + b"\n")
            self._process.stdin.flush()
            if not self._selector.select(timeout_s):
                return {"status": "FAIL", "detail": f"no end after {timeout_s:.0f} s"}, False
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            status = self._process.wait()
            return {"status": "FAIL", "detail": f"process ended ({status})\n{self._tail()}"}, False
        reply = json.loads(line)
        return reply, not reply.pop("is_fatal")

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        self._stderr.close()

    def _tail(self) -> str:
        self._stderr.seek(0)
        return "".join(self._stderr.readlines()[-8:])


def drive(run: Run) -> None:
    """Feed checks to one worker process until none is left or time is up."""
    worker = None
    while True:
        try:
            group, name = run.todo.get_nowait()
        except queue.Empty:
            break
        left = run.deadline - time.monotonic()
        if left <= 0:
            run.note(Outcome(group, name, "NOT RUN", detail="time is up"))
            continue
        worker = worker or Worker(run.device)
        started = time.monotonic()
        reply, is_usable = worker.run(group, name, min(left, run.check_timeout_s))
        run.note(Outcome(group, name, seconds=time.monotonic() - started, **reply))
        if not is_usable:
            worker.close()
            worker = None
    if worker is not None:
        worker.close()


def load_group(group: str) -> dict[str, Callable]:
    """Return the checks of a group, or of `module:LIST`, by name."""
    module, attribute = GROUPS[group] if group in GROUPS else group.split(":")
    return dict(getattr(importlib.import_module(module), attribute))


def work(device_name: str) -> None:
    """Be a worker: a check's group and name per line in, a reply per line out."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what checks print must not come between the replies
    import torch

    device = torch.device(device_name)
    groups: dict[str, dict[str, Callable]] = {}
    for line in sys.stdin:
        group, name = json.loads(line)
        reply = {"status": "PASS", "detail": "", "is_fatal": False}
        try:
            if group not in groups:
                groups[group] = load_group(group)
            groups[group][name](device)
            if device.type == "cuda":
                torch.cuda.synchronize()  # an asynchronous failure belongs to this check
        except Exception as error:  # noqa: BLE001  a worker's top frame: every failure is a result
            reply["status"] = "FAIL"
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            reply["detail"] = f"{type(error).__name__} at {where}: {str(error)[:2000]}"
            # After a device error every later call of this process fails, too.
            reply["is_fatal"] = "CUDA" in str(error) or "cuda" in type(error).__module__
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def collect(run: Run, groups: list[str], match: str) -> None:
    """Queue the checks of all groups; a group that does not import is a failure of its own."""
    for group in groups:
        try:
            names = [name for name in load_group(group) if match in name]
        except Exception as error:  # noqa: BLE001  reported as this group's result
            run.note(Outcome(group, "import", "FAIL", detail=f"{type(error).__name__}: {error}"))
            continue
        for name in names:
            run.todo.put((group, name))


def summary(run: Run) -> str:
    """Lay out one line per group."""
    lines = [f"{'group':<12} passed failed not run  seconds"]
    for group in dict.fromkeys(outcome.group for outcome in run.outcomes):
        mine = [outcome for outcome in run.outcomes if outcome.group == group]
        counts = [sum(o.status == s for o in mine) for s in ("PASS", "FAIL", "NOT RUN")]
        seconds = sum(outcome.seconds for outcome in mine)
        lines.append(f"{group:<12} {counts[0]:>6} {counts[1]:>6} {counts[2]:>7} {seconds:>8.1f}")
    return "\n".join(lines)


def report(run: Run, seconds: float) -> dict:
    """Return what the last line says."""
    import torch
    import triton

    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        commit = None
    is_cuda = run.device.startswith("cuda")
    return {
        "suite": "gpu",
        "device": torch.cuda.get_device_name() if is_cuda else "cpu (Triton interpreter)",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
        "seconds": round(seconds, 1),
        "passed": sum(outcome.status == "PASS" for outcome in run.outcomes),
        "failed": [f"{o.group}: {o.name}" for o in run.outcomes if o.status == "FAIL"],
        "not_run": [f"{o.group}: {o.name}" for o in run.outcomes if o.status == "NOT RUN"],
    }


def main() -> int:
    """Run the suite and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try out this script")
    parser.add_argument("--group", nargs="+", default=list(GROUPS), help="names or module:LIST")
    parser.add_argument("--match", default="", help="only checks whose name contains this")
    parser.add_argument("--jobs", type=int, default=max(1, min(6, (os.cpu_count() or 1) // 2)))
    parser.add_argument("--minutes", type=float, default=7.5, help="checks left by then do not run")
    parser.add_argument("--check-timeout", type=float, default=150, metavar="S")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    add_source_roots()
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    if args.worker:
        work(args.device)
        return 0
    import torch

    if args.device != "cpu" and not torch.cuda.is_available():
        print("no CUDA device here: these checks need one (`make test` runs them interpreted)")
        return 2
    started = time.monotonic()
    run = Run(args.device, args.check_timeout, started + 60 * args.minutes)
    collect(run, args.group, args.match)
    threads = [threading.Thread(target=drive, args=(run,)) for _ in range(args.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(summary(run))
    result = report(run, time.monotonic() - started)
    print(json.dumps(result))
    return 0 if result["passed"] and not result["failed"] and not result["not_run"] else 1


if __name__ == "__main__":
    sys.exit(main())
