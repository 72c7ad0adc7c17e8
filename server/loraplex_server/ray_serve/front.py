"""What Serve's proxies call: reads a request, hands it to the replica that Serve's router picks.

The router is told the adapter as Serve's "multiplexed model id", so that the choice, its bounds and
its failures are Serve's. The front decides nothing but that name.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Final

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex_server.api.access import METRICS_PATH
from loraplex_server.api.envelope import REQUEST_ID_HEADER, Envelope
from loraplex_server.api.error_table import install_error_handlers
from loraplex_server.api.errors import QueueFull, RequestTimedOut
from loraplex_server.engine.errors import EngineUnavailable
from loraplex_server.ray_serve.adapter_key import adapter_key
from loraplex_server.ray_serve.answer_pipe import WholeAnswer
from loraplex_server.ray_serve.event_stream import EventStream
from loraplex_server.ray_serve.fleet_metrics import merge_metrics
from loraplex_server.ray_serve.forwarded import (
    ClientGone,
    ForwardedRequest,
    below_prefix,
    read_request,
)

log = logging.getLogger(__name__)

REPLICA_DEPLOYMENT: Final = "replica"
#: What a client waits that comes back after a replica has gone: others are there at once.
_RETRY_S: Final = 1.0
#: Whoever scrapes waits no longer, by its own default.
_SCRAPE_S: Final = 10.0
_ID_HEADER: Final = REQUEST_ID_HEADER.encode()


def front_builder(*, receive_timeout_s: float, request_timeout_s: float) -> Callable[[], ASGIApp]:
    """Return what builds the application inside a front's own process."""

    def build_front() -> ASGIApp:
        app_name = serve.get_replica_context().app_name
        replicas = serve.get_deployment_handle(REPLICA_DEPLOYMENT, app_name)
        return front_app(Front(replicas, request_timeout_s), receive_timeout_s)

    return build_front


def front_app(front: Front, receive_timeout_s: float) -> ASGIApp:
    """Return a front with what stands around it: bounds on bodies, and errors as answers."""
    # Its own documentation would stand before the replicas'.
    app = FastAPI(openapi_url=None)
    install_error_handlers(app)
    app.add_middleware(Envelope, receive_timeout_s=receive_timeout_s)
    app.mount("/", front)
    return _BelowServe(app)


class Front:
    """ASGI application; used from one event loop.

    Args:
        replicas: the deployment of `Replica`s.
        request_timeout_s: for the first of an answer, waiting for a replica included.
    """

    def __init__(self, replicas: DeploymentHandle, request_timeout_s: float) -> None:
        self._replicas = replicas
        self._request_timeout_s = request_timeout_s
        self._base_names: frozenset[str] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            # Serve's proxies pass them on; before they are accepted, this refuses them.
            await send({"type": "websocket.close"})
            return
        try:
            request = await read_request(scope, receive, ray.put)
        except ClientGone:
            return
        if request.path == METRICS_PATH:
            await self._send_metrics(request, send)
            return
        stream = EventStream(request.path)
        try:
            async with contextlib.aclosing(self._answer(request)) as answer:
                async for messages in answer:
                    for message in messages:
                        stream.see(message)
                        await send(message)
        except (EngineUnavailable, RayError) as error:
            if not stream.is_open:
                raise
            log.warning("a stream is ended for its replica", exc_info=error)
            await send(stream.ending(error))

    async def _answer(self, request: ForwardedRequest) -> AsyncGenerator[list[Message], None]:
        """Yield the answer of the replica that the router picks.

        Raises:
            QueueFull, RequestTimedOut, EngineUnavailable
        """
        with _told(self._request_timeout_s):
            messages: DeploymentResponseGenerator[list[Message]] | None = None
            try:
                async with asyncio.timeout(self._request_timeout_s):
                    key = await self._key_of(request)
                    handle = self._replicas.options(stream=True, multiplexed_model_id=key)
                    messages = handle.answer.remote(request)
                    first = await anext(messages)
                yield first
                async for more in messages:
                    yield more
            finally:
                if messages is not None:
                    # Tells the replica where the client has gone; nothing, where all is said.
                    messages.cancel()

    async def _key_of(self, request: ForwardedRequest) -> str:
        """Return the adapter to route by: what the client says in Serve's header comes first."""
        if given := serve.get_multiplexed_model_id():
            return str(given)
        if self._base_names is None:
            self._base_names = frozenset(await self._replicas.base_names.remote())
        return adapter_key(request.path, request.small_body, self._base_names)

    async def _send_metrics(self, request: ForwardedRequest, send: Send) -> None:
        """Answer with the metrics of every replica that answers, or with a replica's refusal."""
        limit_s = min(_SCRAPE_S, self._request_timeout_s)
        with _told(limit_s):
            asked = self._replicas.broadcast("answer_whole", request)
            results = await asked.results_async(timeout_s=limit_s, return_exceptions=True)
        lost = [result for result in results if isinstance(result, BaseException)]
        for error in lost:
            log.warning("a replica's metrics are missing", exc_info=error)
        answers: dict[str, WholeAnswer] = dict(
            result for result in results if not isinstance(result, BaseException)
        )
        if not answers:
            raise EngineUnavailable(reason="no replica answered", retry_after_s=_RETRY_S)
        refusals = [answer for answer in answers.values() if answer.status != 200]
        answer = next(iter(refusals or answers.values()))
        body = answer.body
        if not refusals:
            pages = {name: each.body for name, each in answers.items()}
            # Not in the event loop: streams go on while many pages are read.
            body = await asyncio.to_thread(merge_metrics, pages, len(lost))
        for message in answer.messages(body):
            await send(message)


@contextlib.contextmanager
def _told(limit_s: float) -> Iterator[None]:
    """Tell Serve's failures as the server's own errors, which say when to come back."""
    try:
        yield
    except TimeoutError:
        raise RequestTimedOut(
            f"no replica began to answer within request_timeout_s of {limit_s:g} s"
        ) from None
    except BackPressureError as error:
        raise QueueFull(
            "all replicas are busy, and enough requests wait for them; try again shortly",
            retry_after_s=_RETRY_S,
        ) from error
    except TaskCancelledError as error:
        raise asyncio.CancelledError from error
    except RayTaskError:
        raise  # a fault of ours, in the replica
    except DeploymentUnavailableError as error:
        raise EngineUnavailable(
            reason="no replica runs; `serve status` says why", retry_after_s=_RETRY_S
        ) from error
    except (RayError, RayServeException) as error:
        raise EngineUnavailable(
            reason="the replica that had this request is gone; try again, others are there",
            retry_after_s=_RETRY_S,
        ) from error


class _BelowServe:
    """ASGI middleware: undoes what Serve's proxy does to requests and would do twice to answers.

    It puts the application's prefix before paths, which would not be those that limits and error
    bodies go by, and writes the request's id into answers itself.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        def send_without_id(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [h for h in message["headers"] if h[0] != _ID_HEADER]
            return send(message)

        await self._app(below_prefix(scope), receive, send_without_id)
