"""The Python client of a loraplex server.

    from loraplex import Client

    with Client() as client:
        client.adapters.push("out/sql-writer")
        answer = client.chat.create(
            model="sql-writer", messages=[{"role": "user", "content": "Who bought most?"}]
        )
        print(answer.text)

`loraplex.push(model, name)` pushes a PEFT model straight from training. `AsyncClient` has the same
methods as `Client`, to be awaited. Importing this package reads no file, no
environment variable and no server code; it needs only httpx and pydantic.
"""

from __future__ import annotations

from loraplex.async_client import AsyncClient
from loraplex.async_stream import AsyncStream
from loraplex.client import Client
from loraplex.errors import (
    AdapterFilesError,
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    InternalServerError,
    InvalidResponseError,
    LoraplexError,
    NotFoundError,
    PayloadTooLargeError,
    PermissionDeniedError,
    RateLimitError,
    StreamError,
    UnprocessableEntityError,
    UsageError,
)
from loraplex.model_push import push
from loraplex.stream import Stream

__version__: str

__all__ = [
    "APIConnectionError",
    "APIStatusError",
    "APITimeoutError",
    "AdapterFilesError",
    "AsyncClient",
    "AsyncStream",
    "AuthenticationError",
    "BadRequestError",
    "Client",
    "ConflictError",
    "InternalServerError",
    "InvalidResponseError",
    "LoraplexError",
    "NotFoundError",
    "PayloadTooLargeError",
    "PermissionDeniedError",
    "RateLimitError",
    "Stream",
    "StreamError",
    "UnprocessableEntityError",
    "UsageError",
    "__version__",
    "push",
]


def __getattr__(name: str) -> str:
    """Look the version up when it is asked for: reading metadata is I/O."""
    if name == "__version__":
        from loraplex.version import installed_version

        return installed_version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
