"""A server with the face of loraplex and no model: it echoes, and keeps adapters in a dict."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from urllib.parse import unquote

from python_multipart.multipart import parse_form

from tests.support.http_server import Received, Reply

NOT_FOUND = {
    "error": {
        "message": "no such thing",
        "type": "not_found_error",
        "code": "adapter_not_found",
    }
}


class TinyLoraplex:
    """Answers requests. `slow_s` is waited before each piece of a stream."""

    def __init__(self, slow_s: float = 0.0) -> None:
        self.slow_s = slow_s
        self.adapters: dict[str, dict] = {}
        self.pool = _pool()
        self.unlisted: set[str] = set()  # paths of models that are there, and on no list
        self.failing: dict[tuple[str, str], Reply] = {}  # (method, path) -> what to say instead

    def answer(self, received: Received) -> Reply:
        key = (received.method, received.path)
        if received.path in self.unlisted:
            return Reply({"id": received.path.rpartition("/")[2]})
        if key in self.failing:
            return self.failing[key]
        if key == ("POST", "/v1/adapters"):
            return self._push(received)
        if key == ("GET", "/v1/adapters"):
            return Reply({"data": list(self.adapters.values()), "has_more": False, "last": None})
        if key == ("GET", "/v1/models"):
            return Reply({"data": [{"id": "base"}, *self._models()]})
        if key == ("POST", "/v1/chat/completions"):
            return Reply(pieces=self._stream(received.json()))
        if key == ("GET", "/v1/pool"):
            return Reply(self.pool)
        path = received.path.removeprefix("/v1/adapters/")
        for action in ("/prefetch", "/versions", "/rollback"):
            path = path.removesuffix(action)
        name = unquote(path)
        if name not in self.adapters:
            return Reply(NOT_FOUND, 404, {"x-request-id": "req-9"})
        if received.path.endswith("/versions"):
            return Reply({"data": [self.adapters[name]], "has_more": False, "last": 1})
        if received.method == "POST" and received.path.endswith("/prefetch"):
            return Reply({"name": name, "id": self.adapters[name]["id"], "tier": "disk"}, 202)
        if received.method == "DELETE":
            freed = {"pool_bytes": 4096, "host_bytes": 0, "disk_bytes": 1_500_000}
            gone = {**self.adapters.pop(name), "object": "adapter.deleted", "deleted": True}
            return Reply({**gone, "freed": freed})
        return Reply(self.adapters[name])

    def add(self, name: str, **fields: object) -> None:
        self.adapters[name] = {
            "object": "adapter",
            "name": name,
            "id": "sha256:00",
            "base_model": "base",
            "rank_max": 8,
            "target_modules": ["q_proj", "v_proj"],
            "size_bytes": 1_500_000,
            "pool_pages": 3,
            "created": 1_700_000_000,
            "state": "registered",
            **fields,
        }

    def _models(self) -> list[dict]:
        return [{"id": name, "parent": "base"} for name in self.adapters]

    def _push(self, received: Received) -> Reply:
        fields: dict[str, str] = {}
        files: dict[str, int] = {}
        if received.headers.get("content-type") == "application/json":
            self.add(received.json()["name"])
            return Reply(self.adapters[received.json()["name"]], 201)

        def on_file(file) -> None:
            files[file.file_name.decode()] = file.size
            file.close()

        parse_form(
            {name.title(): value.encode() for name, value in received.headers.items()},
            io.BytesIO(received.body),
            lambda field: fields.update({field.field_name.decode(): field.value.decode()}),
            on_file,
        )
        self.add(fields["name"], size_bytes=sum(files.values()), files=sorted(files))
        return Reply(self.adapters[fields["name"]], 201)

    def _stream(self, request: dict) -> Iterator[bytes]:
        """Echo the model, the number of turns and the last turn, word by word."""
        turns = request["messages"]
        words = f"{request['model']} heard {len(turns)}: {turns[-1]['content']}".split(" ")
        for index, word in enumerate(words):
            time.sleep(self.slow_s)
            yield _event({"index": 0, "delta": {"content": f" {word}" if index else word}})
        yield _event({"index": 0, "delta": {}, "finish_reason": "stop"})
        usage = {"prompt_tokens": 1, "completion_tokens": len(words), "total_tokens": 9}
        yield _event(usage=usage)
        yield b"data: [DONE]\n\n"


def _pool() -> dict:
    holders = [
        (None, "base", 0, 20, "resident"),
        ("sha256:00", "sql", 9, 5, "resident"),
        ("sha256:11", None, None, 0, "loading"),
    ]
    names = ("id", "name", "weight_pages", "prefix_pages", "state")
    return {
        "num_pages": 100,
        "page_bytes": 4096,
        "page_tokens": 16,
        "kv": 10,
        "prefix_used": 5,
        "prefix_idle": 20,
        "adapters": 15,
        "free": 50,
        "by_adapter": [dict(zip(names, holder, strict=True)) for holder in holders],
        "host": {
            "bytes": 4096,
            "capacity_bytes": 8192,
            "adapters": [{"id": "sha256:00", "name": "sql"}],
        },
    }


def _event(*choices: dict, usage: dict | None = None) -> bytes:
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return f"data: {json.dumps({**chunk, 'choices': choices, 'usage': usage})}\n\n".encode()
