"""Registered adapters are not read before anybody needs them, and the script that says so runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "server/bench/bench_registry.py"


def test_start_lists_and_look_ups_open_no_adapters_file():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--adapters", "1200"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["adapters"] == 1200
    assert figures["adapter_files_opened"] == 0
    assert figures["startup_s"] > 0
