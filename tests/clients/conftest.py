"""Fixtures that run one operation on the sync and on the async client alike."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import httpx
import pytest

import loraplex.async_client
import loraplex.client
from loraplex import AsyncClient, Client
from tests.support.server_process import ServerProcess
from tests.support.tiny_models import save_tiny_model
from tests.support.tiny_tokenizer import make_tokenizer


class Pieces(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A response body that arrives in the given pieces, and may break at its end."""

    def __init__(self, *pieces: bytes, error: Exception | None = None) -> None:
        self.pieces = pieces
        self.error = error
        self.is_closed = False

    def __iter__(self):
        yield from self.pieces
        if self.error:
            raise self.error

    async def __aiter__(self):
        for piece in self:
            yield piece

    def close(self) -> None:
        self.is_closed = True

    async def aclose(self) -> None:
        self.is_closed = True


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in ("LORAPLEX_BASE_URL", "LORAPLEX_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def tiny_server(tmp_path_factory):
    """A real server over a tiny random Llama that can chat; its folder is `tiny_server.model`."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer()
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    save_tiny_model(folder, vocab_size=len(tokenizer), max_position_embeddings=512, **ids)
    tokenizer.save_pretrained(folder)
    sizes = ("--pool-bytes", "4MiB", "--host-bytes", "4MiB", "--threads", "1", "--dtype", "float32")
    server = ServerProcess(
        tmp_path_factory.mktemp("server"),
        *("--model", str(folder), "--served-model-name", "tiny", *sizes),
    )
    server.model = folder
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture
def make_pieces():
    return Pieces


@pytest.fixture
def sleeps(monkeypatch) -> list[float]:
    """Delays between attempts, recorded in place of being slept."""
    slept: list[float] = []

    async def sleep(delay_s: float) -> None:
        slept.append(delay_s)

    monkeypatch.setattr(loraplex.client, "time", SimpleNamespace(sleep=slept.append))
    monkeypatch.setattr(loraplex.async_client, "asyncio", SimpleNamespace(sleep=sleep))
    return slept


@pytest.fixture(params=["sync", "async"])
def on_client(request, sleeps):
    """Return a function that runs an operation against a handler, on either client.

    An operation gets the client and returns a value, an awaitable, or an iterator of either kind,
    which is drained into a list.
    """

    async def run(handler, operation, **settings):
        transport = handler if not inspect.isfunction(handler) else httpx.MockTransport(handler)
        if request.param == "sync":
            with httpx.Client(transport=transport) as http:
                client = Client(http_client=http, **settings)
                return _drained(operation(client))
        async with httpx.AsyncClient(transport=transport) as http:
            client = AsyncClient(http_client=http, **settings)
            value = operation(client)
            return await _adrained(await value if inspect.isawaitable(value) else value)

    return run


def _drained(value):
    return list(value) if hasattr(value, "__next__") else value


async def _adrained(value):
    return [item async for item in value] if hasattr(value, "__anext__") else value
