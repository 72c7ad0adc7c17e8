"""Ranks that are built with a fault; a module of its own, as each rank's process imports it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable

import torch

from loraplex_server import build
from loraplex_server.build import ModelFacts
from loraplex_server.config import Config
from loraplex_server.engine.ranks.messages import Joining, Loaded
from loraplex_server.engine.ranks.seat import Seat
from loraplex_server.engine.ranks.worker import RankParts, WorkerSeat


def build_elsewhere(
    config: Config, facts: ModelFacts, seat: Seat, on_loaded: Callable[[], None]
) -> RankParts:
    """Build a rank that looks for relative paths in another folder than rank 0."""
    assert config.model is not None
    os.chdir(config.model)
    return build.build_rank(config, facts, seat, on_loaded)


def build_without_memory(
    config: Config, facts: ModelFacts, seat: Seat, on_loaded: Callable[[], None]
) -> RankParts:
    raise MemoryError("no room for the arena")


def build_with_heir(
    config: Config, facts: ModelFacts, seat: Seat, on_loaded: Callable[[], None]
) -> RankParts:
    """Build a rank with a child that holds its pipe open, also when the rank has ended."""
    assert isinstance(seat, WorkerSeat)
    subprocess.Popen(["sleep", "600"], pass_fds=[seat._pipe.fileno()])
    return build.build_rank(config, facts, seat, on_loaded)


def build_stopping(stops_in: str, seat: Seat, on_loaded: Callable[[], None]) -> RankParts:
    """Stop, as by SIGSTOP, in one part of the start: load, join or agree."""
    assert isinstance(seat, WorkerSeat)
    if stops_in == "join":
        seat.send(Loaded())
        seat.send(Joining())
    elif stops_in == "agree":
        seat.join(torch.device("cpu"))
    os.kill(os.getpid(), signal.SIGSTOP)
    raise AssertionError("it was continued")
