"""One engine process, from its spawn to its end, as its parent holds it.

The process ignores the signals that end a service politely, so nothing but a message, a closed
pipe or a kill ends it. Whoever creates an `EngineChild` must `end` it; should the interpreter exit
without, it is killed then: multiprocessing would wait for it for ever.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import resource_tracker
from typing import Final

from loraplex_server.engine.messages import Command, Reply
from loraplex_server.engine.process import IGNORED_SIGNALS, CoreFactory, run_engine
from loraplex_server.engine.reply_pipe import ReplyReceiver
from loraplex_server.engine.tether import tethered_process

#: What the engine process has in its environment, unless the user has set it otherwise. Nothing:
#: waiting threads of OpenMP that sleep at once (OMP_WAIT_POLICY=passive) leave the API process more
#: of their cores, but cost the steps a quarter to a third; a short spin, a tenth.
ENGINE_ENVIRONMENT: Final[Mapping[str, str]] = {}


class EngineChild:
    """Used from one event loop, which `on_reply` is called in; it ends with that one's thread.

    Attributes:
        gone: set when the process has closed its end of the pipe and every reply was delivered.
    """

    def __init__(self, build_core: CoreFactory, on_reply: Callable[[Reply], None]) -> None:
        """Spawn the process.

        Raises:
            Exception: it could not be; pickling `build_core` runs code of any kind.
        """
        self.gone = asyncio.Event()
        self._on_reply: Callable[[Reply], None] | None = on_reply
        self._connection, theirs = multiprocessing.Pipe()
        try:
            # Not a daemon, which could have no children: the other ranks.
            self._process = tethered_process(
                run_engine, theirs, build_core, name="loraplex-engine", daemon=False
            )
            with _signals_held_back(), _environment(ENGINE_ENVIRONMENT):
                self._process.start()
        except BaseException:
            self._connection.close()
            raise
        finally:
            theirs.close()
        self._receiver = ReplyReceiver(self._connection, self._deliver, self.gone.set)
        atexit.register(self._process.kill)

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def send(self, command: Command) -> None:
        """Send to the process; that it is dead shows in `gone`, not here.

        A full pipe blocks, but not for long: a thread of the process always drains it.
        """
        with contextlib.suppress(OSError):
            self._connection.send(command)

    def kill(self) -> None:
        self._process.kill()

    async def end(self, grace_s: float = 0.0) -> int | None:
        """Let the process end by itself for so long, then kill it; return its exit code.

        No reply is delivered from now on.
        """
        self._on_reply = None
        try:
            await asyncio.to_thread(self._process.join, grace_s)
        finally:
            self.kill()
        await asyncio.to_thread(self._process.join)
        self._receiver.close()
        self._connection.close()
        atexit.unregister(self._process.kill)
        return self._process.exitcode

    def _deliver(self, reply: Reply) -> None:
        if self._on_reply is not None:
            self._on_reply(reply)


@contextlib.contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """Have variables that are not set in the environment of processes spawned here."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """A process spawned here is born with these signals blocked, until it can ignore them.

    It imports torch first, and a signal to the whole group would strike it in these seconds.
    """
    resource_tracker.ensure_running()  # unblocks both signals, when it is what `start` does first
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
