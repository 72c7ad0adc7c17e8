"""No engine process outlives the process that started it, however that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.processes import is_alive, wait_until_dead

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
    from tests.server.engine.test_process_handle import build_tiny

    time.sleep(seconds)
    return build_tiny(wake)


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
