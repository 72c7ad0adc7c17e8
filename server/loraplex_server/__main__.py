"""`python -m loraplex_server`: settings in, a running server out, stopped cleanly by a signal."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from loraplex_server.config import Config, ConfigError
from loraplex_server.config_sources import load_config
from loraplex_server.logs import set_up_logging

if TYPE_CHECKING:  # settings are refused before anything large is imported
    from loraplex_server.build import ModelFacts

#: As uvicorn has it.
_BACKLOG = 2048
#: What is done ends sooner; what hangs, never.
_THREADS_S = 3.0


class StartError(Exception):
    """The server cannot start; the message is one line for the person who started it."""


def main(
    argv: Sequence[str] | None = None, *, at_end: Callable[[int], None] = lambda code: None
) -> int:
    """Run the server until a signal and return the exit code.

    Args:
        at_end: told the code when all is done but for threads that may hang, which are waited for.
    """
    try:
        config = load_config(sys.argv[1:] if argv is None else argv, os.environ)
    except ConfigError as error:
        return _fail(error, code=2)
    set_up_logging(config.log_level, config.log_format)
    # The tokenizer's threads would take cores from the engine, and a text waits longer for them
    # than one thread takes to encode it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with asyncio.Runner() as runner:
        code = _run(config, runner)
        at_end(code)
    return code


def _run(config: Config, runner: asyncio.Runner) -> int:
    try:
        with bind(config) as listener:
            _wait_for_registry(config)
            _refuse_if_open(config, listener)
            runner.run(_serve(config, listener))
    except StartError as error:
        return _fail(error, code=1)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    return 0


def _fail(error: Exception, code: int) -> int:
    sys.stderr.write(f"loraplex serve: {error}\n")
    return code


def bind(config: Config) -> socket.socket:
    """Take the port at once: finding it busy after loading a model would be late."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # With the protocol: of a socket that does not name it, asyncio does not know that it is
        # TCP, and leaves Nagle's algorithm on, which holds the end of an answer back for 40 ms.
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise _cannot_listen(config, error) from error
    return listener


def _wait_for_registry(config: Config) -> None:
    """Let the registry's database come up with the server, as in a cluster that starts."""
    if config.registry_url is None:
        return
    from loraplex_server.adapters.errors import StorageFailed
    from loraplex_server.adapters.registry_database import wait_for_database

    # As by Ctrl-C: a container's first process ignores what it has no handler for.
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        wait_for_database(config.registry_url, config.registry_wait_s)
    except StorageFailed as error:
        raise StartError(str(error)) from error
    finally:
        signal.signal(signal.SIGTERM, former)


def _refuse_if_open(config: Config, listener: socket.socket) -> None:
    """Let nobody offer the whole network a server without keys by mistake."""
    address = listener.getsockname()[0]
    if ipaddress.ip_address(address).is_loopback or config.allow_open:
        return
    from loraplex_server.adapters.errors import StorageFailed
    from loraplex_server.tenants.key_database import has_keys

    try:
        if has_keys(config):
            return
    except StorageFailed as error:
        raise StartError(str(error)) from error
    raise StartError(
        f"anybody who reaches {address} could use this server and delete its adapters, as it has "
        f"no API keys. Make the first one, an admin's, and start again:\n"
        f"    loraplex keys create --name me --role admin --data-dir {config.data_dir}\n"
        "or set LORAPLEX_API_KEY to a secret of your own, an admin's too. To serve this machine "
        "alone, give --host 127.0.0.1. Behind something that checks who asks:\n"
        "    loraplex serve --allow-open on ..."
    )


def _cannot_listen(config: Config, error: OSError) -> StartError:
    reason = error.strerror or str(error)
    return StartError(
        f"cannot listen on {config.host}:{config.port}: {reason}; choose another --port?"
    )


def _listen(config: Config, listener: socket.socket) -> None:
    """Accept connections from now on; until here they were refused, not left waiting."""
    try:
        listener.listen(_BACKLOG)
    except OSError as error:
        raise _cannot_listen(config, error) from error


async def _serve(config: Config, listener: socket.socket) -> None:
    """Serve until a signal."""
    from loraplex_server.adapters.errors import AdapterError
    from loraplex_server.api.traces import TracesUnavailable
    from loraplex_server.build import resolve_facts
    from loraplex_server.engine.errors import EngineError
    from loraplex_server.model.errors import ModelError

    stopping = asyncio.current_task()
    assert stopping is not None
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.cancel)
    try:
        await _serve_model(config, await asyncio.to_thread(resolve_facts, config), listener)
    except (AdapterError, EngineError, ModelError, TracesUnavailable) as error:
        raise StartError(str(error)) from error
    finally:
        gc.unfreeze()  # the last collection leaves what is frozen, and libraries write of leaks


async def _serve_model(config: Config, facts: ModelFacts, listener: socket.socket) -> None:
    """Build everything, serve until this is cancelled, and take it down in order."""
    from loraplex_server.api.last_writes import in_last_writes_time
    from loraplex_server.api.server import Server
    from loraplex_server.api.services import start_services
    from loraplex_server.build import build_engine_handle

    engine = build_engine_handle(config, facts)
    try:
        services = await start_services(config, facts, engine)
        _settle()
        try:
            _listen(config, listener)
            await Server(services).serve_until_signal(listener)
        finally:
            await engine.stop()
            await in_last_writes_time(asyncio.to_thread(services.catalog.close))
    finally:
        await engine.stop()


def _settle() -> None:
    """Take what start-up left to stay for good, out of the sight of Python's collector.

    Half a million objects of torch and its like: a full collection among running streams would
    walk through them all, and hold every stream up for 0.7 s.
    """
    gc.collect()
    gc.freeze()


def _leave_soon(code: int) -> None:
    """End the process in a while even so: a thread may hang in a database or a store for ever."""
    leaving = threading.Timer(_THREADS_S, os._exit, [code])
    leaving.daemon = True
    leaving.start()


if __name__ == "__main__":
    sys.exit(main(at_end=_leave_soon))
