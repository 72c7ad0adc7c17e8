"""An engine in a process of its own that writes down what requests hold when they are cancelled.

Its steps are held at gates, which are files, so that a client can leave at a chosen moment.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loraplex_memory.allocator import PageUse
from loraplex_scheduler.plan import Event
from loraplex_server.engine.core import EngineCore
from tests.support.adapters import make_tiny_base
from tests.support.engine import GatedPool, make_core
from tests.support.tiny_models import transformer_of

#: Without the file, adapters do not load.
LOADS = "loads"
#: Without it, every step takes a while: prompts are long in coming.
QUICK = "quick"
_SLOW_STEP_S = 0.02


class WatchedCore:
    """An `EngineCore` with a diary; everything else is the core's own."""

    def __init__(self, core: EngineCore, folder: Path) -> None:
        self._core = core
        self._folder = folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def abort(self, request_id: str) -> list[Event]:
        """Abort, check all accounts, and note what was held before and after."""
        before = self._held()
        events = self._core.abort(request_id)
        self._core.check()
        entry = {"id": request_id, "before": before, "after": self._held()}
        with (self._folder / "diary").open("a") as diary:
            diary.write(json.dumps(entry) + "\n")
        return events

    def step(self, load_timeout_s: float = 0.0) -> list[Event]:
        """Take a step, a slow one unless `QUICK` is there."""
        if not (self._folder / QUICK).exists():
            time.sleep(_SLOW_STEP_S)
        return self._core.step(load_timeout_s)

    def _held(self) -> dict[str, int]:
        stats = self._core.stats()
        return {
            "pages": self._core._accounts.allocator.num_held(PageUse.KV) + stats.pages_prefix_used,
            "running": stats.num_running,
            "waiting": stats.num_waiting,
            "generated": stats.generated_tokens,
        }


def build_watched(folder: Path, wake: Callable[[], None]) -> Any:
    """Return the core; picklable with its folder, as `ProcessEngine` wants it."""
    torch.set_num_threads(1)
    model = transformer_of(make_tiny_base(), max_model_len=512)
    pool = functools.partial(GatedPool, folder / LOADS)
    core = make_core(
        model, num_pages=128, max_step_tokens=16, max_running=2, wake=wake, make_pool=pool
    )
    return WatchedCore(core, folder)


def read_diary(folder: Path) -> list[dict[str, Any]]:
    """Return the entries so far."""
    path = folder / "diary"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
