"""The script behind the traffic figures in the docs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "kernels/bench/print_traffic.py"


def test_no_step_reads_more_than_two_percent_of_padding():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--launches"], check=True, capture_output=True, text=True
    )
    records = json.loads(done.stdout.splitlines()[-1])
    assert len(records) == 4 * 4 * 2
    assert max(record["padding"] for record in records) <= 0.02
    mixed = [record for record in records if record["ranks"].startswith("S2")]
    assert all(record["padded_slots"] > 2 for record in mixed)
