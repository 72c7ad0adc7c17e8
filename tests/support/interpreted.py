"""Triton's interpreter for several threads: it keeps the grid and its patches in globals."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from triton.runtime.interpreter import GridExecutor


@pytest.fixture(name="one_launch_at_a_time")
def _one_launch_at_a_time(monkeypatch):
    """Let ranks that are threads of this process launch kernels; never held between launches."""
    lock, launch = threading.Lock(), GridExecutor.__call__

    def launch_alone(executor: Any, *args: Any, **options: Any) -> None:
        with lock:
            launch(executor, *args, **options)

    monkeypatch.setattr(GridExecutor, "__call__", launch_alone)
