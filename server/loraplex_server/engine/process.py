"""The engine process: commands in, events out, until the other end is gone.

The main thread steps the core; a second thread receives commands, so that the pipe is always
drained. Signals that end a service reach the whole process group, so they are ignored here: the
API process decides, by `Shutdown` or, should it die, by the pipe that closes with it; even a
stopped engine ends with the thread that spawned it (`tether`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Protocol

from loraplex_scheduler.collector import CycleCollector
from loraplex_scheduler.plan import Event
from loraplex_server.engine.core import EngineCore
from loraplex_server.engine.discards import PendingDiscards
from loraplex_server.engine.errors import EngineError
from loraplex_server.engine.messages import (
    Cancel,
    Command,
    DiscardAdapter,
    KeepAdapters,
    LearnTokens,
    PrefetchAdapter,
    Ready,
    Shutdown,
    StartFailed,
    StepOutput,
    Submit,
)
from loraplex_server.engine.reply_pipe import ReplySender
from loraplex_server.model.errors import ModelError

log = logging.getLogger(__name__)

#: What ends a service politely, sent to its whole process group.
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM)

#: How long to sleep at most when nothing can be computed; deadlines are looked at this often.
IDLE_S = 0.25

#: A snapshot names every resident adapter, so it is not sent with every step.
STATS_EVERY_S = 0.1


class CoreFactory(Protocol):
    """Builds the core inside the engine process; `wake` is for the loader's thread."""

    def __call__(self, wake: Callable[[], None]) -> EngineCore: ...


def run_engine(connection: Connection, build_core: CoreFactory) -> None:
    """Run the engine until `Shutdown` or until the connection closes, in a `tethered_process`."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
    with contextlib.closing(ReplySender(connection)) as replies:
        core = _try_build(replies, build_core, lambda: inbox.put(None))
        if core is None:
            return
        collector = CycleCollector(time.monotonic())
        try:
            replies.send(Ready(core.info))
            _serve(core, replies, inbox, collector)
        except (BrokenPipeError, ConnectionResetError):
            log.warning("the API process is gone")
        finally:
            core.close()
            collector.release()


def _try_build(
    replies: ReplySender, build_core: CoreFactory, wake: Callable[[], None]
) -> EngineCore | None:
    """Build the core; None when that is not possible, and the other end was told why."""
    try:
        return build_core(wake)
    except (EngineError, ModelError) as error:
        message = str(error)
    except Exception as error:
        log.exception("the engine could not start")
        message = f"{type(error).__name__}: {error}"
    replies.send(StartFailed(message))
    replies.flush()
    return None


def _serve(
    core: EngineCore,
    replies: ReplySender,
    inbox: queue.SimpleQueue[Command | None],
    collector: CycleCollector,
) -> None:
    stats_due = 0.0
    discards = PendingDiscards(core)
    while True:
        if core.has_work:
            replies.push()
        else:
            replies.flush()  # an API process that reads nothing sends nothing new either
        events: list[Event] = []
        for command in _drain(core, inbox):
            if isinstance(command, Shutdown):
                return
            events += _apply(core, discards, command)
        if core.has_work:
            events += core.step()
        for discarded in discards.take_done():
            replies.send(discarded)
        now = time.monotonic()
        is_due = now >= stats_due or not core.has_work
        if is_due:
            stats_due = now + STATS_EVERY_S
        if events or is_due:
            replies.send(StepOutput.of(events, core.stats() if is_due else None))
        collector.collect_if_due(now, is_idle=not core.has_work)


def _drain(core: EngineCore, inbox: queue.SimpleQueue[Command | None]) -> list[Command]:
    """Take all commands; sleep when there is nothing to compute, until something happens."""
    commands: list[Command] = []
    must_wait = not core.has_work or core.is_waiting_for_loads
    timeout = IDLE_S if core.has_work else None
    try:
        if must_wait and (command := inbox.get(timeout=timeout)) is not None:
            commands.append(command)
        while True:
            if (command := inbox.get_nowait()) is not None:
                commands.append(command)
    except queue.Empty:
        return commands


def _apply(core: EngineCore, discards: PendingDiscards, command: Command) -> list[Event]:
    if isinstance(command, Submit):
        return [event for request in command.requests for event in core.add(request)]
    if isinstance(command, Cancel):
        return [event for request_id in command.request_ids for event in core.abort(request_id)]
    if isinstance(command, DiscardAdapter):
        discards.begin(command.adapter_id)
    elif isinstance(command, KeepAdapters):
        core.keep_adapters(command.adapter_ids)
    elif isinstance(command, PrefetchAdapter):
        core.prefetch(command.manifest)
    elif isinstance(command, LearnTokens):
        core.learn_tokens(command.tokenizer)
    return []


def _receive(connection: Connection, inbox: queue.SimpleQueue[Command | None]) -> None:
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        # The API process died. Nobody waits for an answer and nothing here needs saving, while
        # loading a model or a long step would keep this process and its memory for minutes.
        os._exit(0)
