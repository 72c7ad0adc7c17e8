"""`loraplex simulate`, which becomes the simulator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loraplex.cli import simulate
from loraplex.cli.app import app


@pytest.mark.parametrize("args", [["--help"], ["run", "--rate", "3", "--json"], []])
def test_simulate_becomes_the_simulator_with_every_argument(args, monkeypatch):
    seen: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(os, "execv", lambda path, argv: seen.append((path, argv)))
    assert CliRunner().invoke(app, ["simulate", *args]).exit_code == 0
    assert seen == [(sys.executable, [sys.executable, "-m", "loraplex_server.simulator", *args])]


def test_without_the_server_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(simulate, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["simulate", "hour"])
    assert result.exit_code == 1
    assert "pip install 'loraplex[server]'" in result.stderr


def test_its_exit_code_and_output_are_the_simulators():
    command = [str(Path(sys.executable).with_name("loraplex")), "simulate"]
    listed = subprocess.run([*command, "--list"], capture_output=True, text=True, timeout=60)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "overload" in listed.stdout
    wrong = subprocess.run([*command, "rum"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2
    assert "invalid choice: 'rum'" in wrong.stderr
