"""Whether a server can be used from here."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import httpx

from loraplex.cli.doctor.finding import Finding, fail, note, ok
from loraplex.cli.models import has_model
from loraplex.cli.problems import explain
from loraplex.client import Client
from loraplex.errors import (
    APIConnectionError,
    AuthenticationError,
    LoraplexError,
    PermissionDeniedError,
)
from loraplex.types import Model
from loraplex.version import installed_version

_LOCAL = ("127.0.0.1", "localhost", "::1")
_MAX_SKEW_S = 30.0
_TIMEOUT_S = 10.0


def check_server(shared: Client, model: str | None) -> Iterator[Finding]:
    """Yield what was found, until something fails that the rest needs.

    Args:
        shared: Whom to ask, and where.
        model: A name that has to be there; None for any.
    """
    client = shared.with_options(timeout=_TIMEOUT_S, max_retries=0)
    try:
        health = client.health()
    except APIConnectionError as error:
        yield from _nobody(client.base_url, error)
        return
    except LoraplexError as error:
        yield fail("server", explain(error), "see that --base-url is a loraplex server's")
        return
    told = f"{client.base_url}: {health.status}"
    if health.is_ok:
        yield ok("server", told)
    else:
        yield fail("server", told, "wait until it has started; if it stays so, see its log")
    yield check_clock(client.base_url)
    try:
        models = client.models.list()
    except (AuthenticationError, PermissionDeniedError) as error:
        yield fail("key", str(error), "give a key with --api-key or LORAPLEX_API_KEY")
        return
    except LoraplexError as error:
        yield fail("models", explain(error), "see the server's log")
        return
    yield ok("key", "accepted, or none needed")
    yield check_version(client)
    is_there = model is None or model in [m.id for m in models] or has_model(client, model)
    yield from check_models(models, None if is_there else model)
    yield from check_adapters(client, models)


def check_version(client: Client) -> Finding:
    """Compare the server's version with this one's."""
    ours, theirs = installed_version(), client.version()
    if ours != theirs:
        told = f"the server is {theirs}, this is {ours}"
        return note(
            "version", told, f"if a command is unknown there: pip install loraplex=={theirs}"
        )
    return ok("version", ours)


def check_models(models: list[Model], missing: str | None) -> Iterator[Finding]:
    """Tell what is served, and what of that was wanted and is not."""
    bases = [found.id for found in models if found.parent is None]
    if not bases:
        yield fail("models", "the server lists no base model", "see its log, and its --model")
        return
    told = f"{', '.join(bases)}, and {len(models) - len(bases)} adapters"
    if missing is not None:
        advice = (
            f"push it: loraplex adapters push FOLDER --name {missing}; or see `loraplex models`"
        )
        yield fail("models", f"no {missing!r} among {told}", advice)
    else:
        yield ok("models", told)


def check_adapters(client: Client, models: list[Model]) -> Iterator[Finding]:
    """Check that adapters were trained for a model that is served."""
    bases = [model.id for model in models if model.parent is None]
    strangers: list[str] = []
    count = 0
    try:
        for adapter in client.adapters.list():
            count += 1
            if not any(is_same_base(adapter.base_model, base) for base in bases):
                strangers.append(f"{adapter.name} ({adapter.base_model})")
    except LoraplexError as error:
        yield note("adapters", explain(error), "another key may see them")
        return
    if strangers:
        told = f"{len(strangers)} of {count} are of another base: {', '.join(strangers[:3])}"
        advice = "nothing, if that is the same model renamed; else: loraplex adapters rm NAME"
        yield note("adapters", told, advice)
    else:
        yield ok("adapters", f"{count}, all of the base that is served")


def is_same_base(one: str, other: str) -> bool:
    """Whether two names are one model's, without owner or folder, and with a suffix or without."""
    short, long = sorted((name.rsplit("/", 1)[-1].casefold() for name in (one, other)), key=len)
    return bool(short) and (long == short or long.startswith((f"{short}-", f"{short}.")))


def check_clock(base_url: str) -> Finding:
    """Compare this machine's clock with the server's, which is told to the second."""
    try:
        sent_s = time.time()
        response = httpx.get(f"{base_url}/health", timeout=_TIMEOUT_S)
        told = parsedate_to_datetime(response.headers["date"]).timestamp()
    except (httpx.HTTPError, KeyError, ValueError) as error:
        return note("clock", f"the server does not tell the time ({error!r})", "compare `date -u`")
    skew_s = told - (sent_s + time.time()) / 2
    if abs(skew_s) > _MAX_SKEW_S:
        ahead = "ahead of" if skew_s > 0 else "behind"
        return note(
            "clock",
            f"the server's is {abs(skew_s):.0f} s {ahead} this one",
            "set both by NTP: keys expire and usage is booked by the server's",
        )
    return ok("clock", "agrees with the server's")


def _nobody(base_url: str, error: APIConnectionError) -> Iterator[Finding]:
    yield fail("server", explain(error), f"see whether it runs: curl {base_url}/health")
    url = urlsplit(base_url)
    if url.hostname not in _LOCAL:
        return
    port = url.port or (443 if url.scheme == "https" else 80)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as problem:
            told = f"{port} cannot be used: {problem.strerror}"
            yield fail("port", told, f"stop what uses it (ss -ltnp | grep {port}), or give --port")
        else:
            yield ok("port", f"{port} is free for a server")
