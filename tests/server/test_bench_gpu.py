"""The script behind `make bench-gpu` runs to its end in tiny sizes, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "server/bench/bench_gpu.py"


def run_script(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("section", ["kernels", "steps", "serving"])
def test_a_dry_run_of_every_section_ends_and_reports_no_numbers(section):
    status, output, errors = run_script("--dry-run", "--sections", section)
    assert status == 0, output + errors
    assert "left out" not in output
    assert set(json.loads(output.splitlines()[-1])) == {
        *("bench", "commit", "device", "torch", "triton", "seconds", "notes", "failures")
    }


def test_what_no_time_is_left_for_is_named():
    status, output, errors = run_script("--dry-run", "--sections", "kernels", "--minutes", "0")
    assert status == 0, output + errors
    assert "1 of 1 LoRA cases: out of time" in json.loads(output.splitlines()[-1])["notes"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so():
    status, output, _ = run_script()
    assert status == 2
    assert "no CUDA device" in output
