from __future__ import annotations

import json

import pytest

from loraplex_server.engine.errors import EngineUnavailable
from loraplex_server.ray_serve.event_stream import EventStream

ERROR = EngineUnavailable(reason="gone", retry_after_s=1.0)
START = {"type": "http.response.start", "status": 200}
START |= {"headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}


def body(text, more=True):
    return {"type": "http.response.body", "body": text, "more_body": more}


def ending(path, *bodies):
    """Return the events that end a stream, by their names, and all of its last message."""
    stream = EventStream(path)
    for message in (START, *map(body, bodies)):
        stream.see(message)
    assert stream.is_open
    message = stream.ending(ERROR)
    assert (message["type"], message.get("more_body", False)) == ("http.response.body", False)
    return message["body"].decode()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_openais_streams_end_as_the_server_ends_them(path):
    error, done = ending(path).removesuffix("\n\n").split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    assert done == "data: [DONE]"


def test_anthropics_do():
    name, data = ending("/v1/messages").removesuffix("\n\n").split("\n")
    assert name == "event: error"
    shape = json.loads(data.removeprefix("data: "))
    assert (shape["type"], shape["error"]["type"]) == ("error", "overloaded_error")


def test_loraxs_do():
    data = json.loads(ending("/generate_stream").removeprefix("data:"))
    assert (data["error_type"], data["error"]) == ("generation", str(ERROR))


def test_a_responses_events_go_on_being_counted():
    shapes = [{"delta": "a\ndata: 9", "sequence_number": number} for number in range(4)]
    events = [f"event: x\ndata: {json.dumps(shape)}\n\n" for shape in shapes]
    for sent, number in (([events[0], events[1] + events[2], ""], 3), ([], 0)):
        name, data = ending("/v1/responses", *(text.encode() for text in sent)).strip().split("\n")
        assert name == "event: error"
        shape = json.loads(data.removeprefix("data: "))
        assert (shape["type"], shape["sequence_number"]) == ("error", number)
        assert shape["code"] == "engine_unavailable"


def test_only_a_stream_of_events_is_open_and_only_to_its_end():
    stream = EventStream("/v1/completions")
    assert not stream.is_open
    stream.see({**START, "headers": [(b"content-type", b"application/json")]})
    assert not stream.is_open
    stream = EventStream("/v1/completions")
    for message, is_open in ((START, True), (body(b"a"), True), (body(b"b", more=False), False)):
        stream.see(message)
        assert stream.is_open == is_open
