from __future__ import annotations

import pickle

import httpx
import pytest

import loraplex
from loraplex import errors
from loraplex.errors import ErrorDetail, LoraplexError, error_type, parse_error_body


def subclasses(cls: type) -> set[type]:
    return {cls}.union(*(subclasses(child) for child in cls.__subclasses__()))


def answering(status: int, body: object = None, **headers: str):
    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, json=body, headers=headers)

    return handler


def raising(error: Exception):
    def handler(request: httpx.Request) -> httpx.Response:
        raise error

    return handler


def list_models(client):
    return client.models.list()


def stream_chat(client):
    return client.chat.create(model="m", messages=[], stream=True)


def push_nothing(client):
    return client.adapters.push("/nonexistent/adapter")


def get_nothing(client):
    return client.adapters.get("")


# How each error comes about: what the network does, and what the caller asked.
ROUTES = {
    errors.UsageError: (answering(200), get_nothing),
    errors.AdapterFilesError: (answering(200), push_nothing),
    errors.APIConnectionError: (raising(httpx.ConnectError("refused")), list_models),
    errors.APITimeoutError: (raising(httpx.ReadTimeout("slow")), list_models),
    errors.APIStatusError: (answering(418), list_models),
    errors.BadRequestError: (answering(400), list_models),
    errors.AuthenticationError: (answering(401), list_models),
    errors.PermissionDeniedError: (answering(403), list_models),
    errors.NotFoundError: (answering(404), list_models),
    errors.ConflictError: (answering(409), list_models),
    errors.PayloadTooLargeError: (answering(413), list_models),
    errors.UnprocessableEntityError: (answering(422), list_models),
    errors.RateLimitError: (answering(429), list_models),
    errors.InternalServerError: (answering(500), list_models),
    errors.StreamError: (answering(200), stream_chat),
    errors.InvalidResponseError: (answering(200, ["not a list of models"]), list_models),
}


def test_every_error_has_a_route_below_and_is_exported():
    assert set(ROUTES) == subclasses(LoraplexError) - {LoraplexError}
    assert {cls.__name__ for cls in subclasses(LoraplexError)} <= set(loraplex.__all__)


def test_the_tree_in_the_docstring_is_complete():
    for cls in subclasses(LoraplexError):
        assert f" {cls.__name__} " in errors.__doc__.replace("\n", " ")


@pytest.mark.parametrize("error", ROUTES, ids=lambda cls: cls.__name__)
async def test_every_error_can_be_raised(error, on_client):
    handler, operation = ROUTES[error]
    with pytest.raises(LoraplexError) as caught:
        await on_client(handler, operation)
    assert type(caught.value) is error
    copied = pickle.loads(pickle.dumps(caught.value))
    assert str(copied) == str(caught.value) != ""


def test_every_server_error_has_one_class():
    assert {error_type(status) for status in range(500, 600)} == {errors.InternalServerError}


async def test_a_status_error_carries_everything_the_server_said(on_client):
    body = {
        "error": {
            "message": "the adapter is refused",
            "type": "invalid_adapter",
            "param": "files",
            "code": "adapter_refused",
            "reasons": ["use_dora is not supported", "layer 3 holds NaN"],
        }
    }
    headers = {"x-request-id": "req-7", "retry-after": "100"}
    with pytest.raises(errors.UnprocessableEntityError) as caught:
        await on_client(answering(422, body, **headers), list_models)
    error = caught.value
    assert (error.status_code, error.type, error.param) == (422, "invalid_adapter", "files")
    assert (error.code, error.request_id, error.retry_after_s) == ("adapter_refused", "req-7", 100)
    assert error.reasons == ("use_dora is not supported", "layer 3 holds NaN")
    assert error.body == body
    assert str(error) == ("the adapter is refused: use_dora is not supported; layer 3 holds NaN")


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b'{"error":{"message":"m","code":404}}', ("m", "404")),
        (b'{"error":"Unauthorized"}', ("Unauthorized", None)),
        (b'{"object":"error","message":"m","code":400}', ("m", "400")),
        (b'{"detail":"Not Found"}', ("Not Found", None)),
        (b"<html>Bad Gateway</html>", ("HTTP 502: <html>Bad Gateway</html>", None)),
        (b"", ("HTTP 502", None)),
        (b"null", ("HTTP 502", None)),
        (b'{"error":{"message":null}}', ("HTTP 502", None)),
        (b"\xff\xfe", ("HTTP 502: \ufffd\ufffd", None)),
    ],
)
def test_error_bodies_of_all_kinds_are_read(content, detail):
    found = parse_error_body(content, fallback="HTTP 502")
    assert (found.message, found.code) == detail


def test_reasons_that_the_message_holds_are_not_repeated():
    assert str(ErrorDetail("refused: NaN", reasons=("NaN",))) == "refused: NaN"
