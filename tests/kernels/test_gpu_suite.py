"""The script behind `make test-gpu` reports every check, however it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "support/gpu_suite.py"


def run_suite(*arguments: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_hangs_crashes_and_failures_cost_one_check_each():
    status, output = run_suite(
        *("--device", "cpu", "--jobs", "1", "--check-timeout", "8"),
        *("--group", "tests.support.suite_toys:CHECKS", "no.such_module:CHECKS"),
    )
    result = json.loads(output.splitlines()[-1])
    assert status == 1, output
    assert result["passed"] == 2
    failed = {name.rpartition(": ")[2] for name in result["failed"]}
    assert failed == {"fails", "crashes", "hangs", "breaks the device", "import"}
    assert "process ended (7)" in output
    assert "no end after 8 s" in output
    assert "Tensor-likes are not close" in output


def test_checks_for_which_there_is_no_time_are_named():
    status, output = run_suite(
        *("--device", "cpu", "--minutes", "0", "--group", "tests.support.suite_toys:CHECKS")
    )
    assert status == 1, output
    assert len(json.loads(output.splitlines()[-1])["not_run"]) == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so():
    status, output = run_suite()
    assert status == 2
    assert "no CUDA device" in output


def test_every_group_imports_with_the_libraries_of_the_engine_core_alone():
    program = """
import importlib.abc, sys
ABSENT = {"pytest", "fastapi", "starlette", "sqlalchemy", "openai", "uvicorn"}
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"no {name} on a GPU machine", name=name)
sys.meta_path.insert(0, Absent())
import gpu_suite
gpu_suite.add_source_roots()
for group in gpu_suite.GROUPS:
    assert gpu_suite.load_group(group), group
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
