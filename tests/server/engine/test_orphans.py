"""No process of an engine outlives the process that started it, however that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.processes import children_of, is_alive, wait_until_dead

ROOT = Path(__file__).parents[3]
SCRIPT = """
import asyncio, functools, sys, time
from loraplex_server.engine.process_handle import ProcessEngine
from tests.server.engine.test_orphans import build

loop = asyncio.new_event_loop()
engine = ProcessEngine(functools.partial(build, {seconds}))
starting = loop.create_task(engine.start())
while not engine.process_id:
    loop.run_until_complete(asyncio.sleep(0.01))
if not {seconds}:
    loop.run_until_complete(starting)
print(engine.process_id, flush=True)
{ending}
"""


def build(seconds, wake):
    from tests.server.engine.test_process_handle import build_tiny, of_tiny_model

    time.sleep(seconds)
    return of_tiny_model(build_tiny)(wake)


@pytest.mark.parametrize("seconds", [0, 600], ids=["ready", "starting"])
@pytest.mark.parametrize("ending", ["time.sleep(600)", "sys.exit()"], ids=["killed", "exits"])
def test_the_engine_ends_with_its_parent(ending, seconds):
    code = SCRIPT.format(seconds=seconds, ending=ending)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        engine_pid = int(parent.stdout.readline())
        if ending.startswith("time"):
            if not seconds:
                os.kill(engine_pid, signal.SIGSTOP)  # then it reads no closed pipe
            parent.send_signal(signal.SIGKILL)
        try:
            parent.wait(timeout=20)
            wait_until_dead(engine_pid)
        finally:
            parent.kill()
            if is_alive(engine_pid):
                os.kill(engine_pid, signal.SIGKILL)


class SlowToImport:
    """What takes ten minutes to unpickle, as modules may on a slow disk."""

    def __reduce__(self):
        return time.sleep, (600,)


START_ENGINE = """
import asyncio, functools, time
from loraplex_server.engine.process_handle import ProcessEngine
from tests.server.engine.test_orphans import SlowToImport, build

async def start():
    engine = ProcessEngine(functools.partial(build, SlowToImport()))
    starting = asyncio.create_task(engine.start())
    while not engine.process_id:
        await asyncio.sleep(0.01)

loop = asyncio.new_event_loop()
loop.run_until_complete(start())
"""
START_RANKS = """
import functools, time
from loraplex_server.engine.ranks.workers import RankWorkers
from tests.server.engine.test_orphans import SlowToImport, build

ranks = RankWorkers(3, functools.partial(build, SlowToImport()))
"""


@pytest.mark.parametrize(
    ("start", "num_children"), [(START_ENGINE, 1), (START_RANKS, 2)], ids=["engine", "ranks"]
)
def test_what_still_imports_ends_with_its_parent(start, num_children):
    code = start + "print(flush=True)\ntime.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        parent.stdout.readline()
        children = [pid for pid in children_of(parent.pid) if is_spawned(pid)]
        assert len(children) == num_children
        parent.kill()
        try:
            # It ends at once, or before it imports what makes it slow.
            for pid in children:
                wait_until_dead(pid)
            # Somebody who reads what they all write waits for the last of them.
            assert parent.stdout.read() == b""
        finally:
            for pid in filter(is_alive, children):
                os.kill(pid, signal.SIGKILL)


def is_spawned(pid):
    """Whether a process is one of multiprocessing's, but not the tracker that it keeps."""
    return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
