"""One engine process, from its spawn to its end, as its parent holds it.

The process ignores the signals that end a service politely, so nothing but a message, a closed
pipe or a kill ends it. Whoever creates an `EngineChild` must `end` it; should the interpreter exit
without, it is killed then: multiprocessing would send SIGTERM and wait for ever.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker

from loraplex_server.engine.messages import Command, Reply
from loraplex_server.engine.process import IGNORED_SIGNALS, CoreFactory, run_engine


class EngineChild:
    """Used from one event loop, which `on_reply` is called in.

    Attributes:
        gone: set when the process has closed its end of the pipe and every reply was delivered.
    """

    def __init__(self, build_core: CoreFactory, on_reply: Callable[[Reply], None]) -> None:
        """Spawn the process.

        Raises:
            Exception: it could not be; pickling `build_core` runs code of any kind.
        """
        context = multiprocessing.get_context("spawn")
        self.gone = asyncio.Event()
        self._on_reply: Callable[[Reply], None] | None = on_reply
        self._loop = asyncio.get_running_loop()
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=run_engine, args=(theirs, build_core), daemon=True, name="loraplex-engine"
        )
        self._reader = threading.Thread(target=self._read, name="engine-replies", daemon=True)
        self._reader.start()
        try:
            with _signals_held_back():
                self._process.start()
        finally:
            theirs.close()  # without a process this ends the reader, too
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
        await asyncio.to_thread(self._reap)
        return self._process.exitcode

    def _reap(self) -> None:
        self._process.join()
        # Not before the reader has met the end of the pipe: it would read from a foreign file.
        self._reader.join()
        self._connection.close()
        atexit.unregister(self._process.kill)

    def _deliver(self, reply: Reply) -> None:
        if self._on_reply is not None:
            self._on_reply(reply)

    def _read(self) -> None:
        """Thread: move replies into the event loop until the process is gone."""
        with contextlib.suppress(RuntimeError):  # the loop was closed under us
            try:
                while True:
                    self._loop.call_soon_threadsafe(self._deliver, self._connection.recv())
            except (EOFError, OSError):
                pass
            finally:
                self._loop.call_soon_threadsafe(self.gone.set)


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
