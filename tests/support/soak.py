"""Clients that behave as badly as clients do, and the accounts that a server owes them.

Every request is one of the kinds in `MIX`, drawn from a seeded generator. What each of them may be
answered is known: anything else is a problem. `Tally` counts, from the outside, how sequences
ended; the server's own counters must agree with it.
"""

from __future__ import annotations

import asyncio
import collections
import json
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx

#: Kinds of requests and how often each comes, in per cent.
MIX: Final[Mapping[str, int]] = {
    "stream": 32,
    "whole": 20,
    "fan_out": 4,
    "leave": 12,
    "leave_early": 4,
    "deadline": 6,
    "bad_body": 6,
    "unknown_model": 4,
    "upload": 4,
    "delete_drain": 2,
    "delete_cancel": 2,
    "prefetch": 3,
    "leave_upload": 1,
}
_BAD_BODIES: Final = (
    b"",
    b"{",
    b"[]",
    b'{"model": "tiny", "prompt": "a", "max_tokens": -1}',
    b'{"model": "tiny", "prompt": "a", "temperature": "hot"}',
    b'{"model": "tiny", "prompt": "a", "nonsense": 1}',
    b'{"model": "tiny", "prompt": "a", "max_tokens": 100000}',
    b'{"model": "tiny", "prompt": [999999]}',
    b'{"model": "tiny", "prompt": ' + b"[" * 5000,
    b'{"model": "tiny", "prompt": "' + b"x" * 20_000 + b'"}',
)
_TIMEOUT_S: Final = 120.0


@dataclass
class Tally:
    """What clients saw.

    Attributes:
        kinds: requests by kind.
        statuses: answers by kind and status.
        ended: sequences by how their clients saw them end, in the engine's words.
        unseen: sequences whose clients left: they may have been accepted, and ended anyhow.
        problems: what no client should see.
    """

    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    statuses: collections.Counter[str] = field(default_factory=collections.Counter)
    ended: collections.Counter[str] = field(default_factory=collections.Counter)
    unseen: int = 0
    problems: list[str] = field(default_factory=list)

    def expect(self, kind: str, answer: httpx.Response, *allowed: int) -> bool:
        """Book an answer; return whether it was a success."""
        self.statuses[f"{kind} {answer.status_code}"] += 1
        if answer.status_code not in allowed:
            self.problems.append(f"{kind}: {answer.status_code} {answer.text[:300]}")
        return answer.status_code < 300

    def end_by_error(self, kind: str, error: Mapping[str, Any], num: int) -> None:
        """Book an answer that an error ended, of a request of `num` sequences."""
        outcomes = {
            "deadline_exceeded": "timed_out",
            "adapter_deleted": "cancelled",
            "overloaded": "rejected",
        }
        if error["code"] in outcomes:
            # The first one that ends so ends the answer; of the others nobody can tell.
            self.ended[outcomes[error["code"]]] += 1
            self.unseen += num - 1
        elif error["code"] not in {"model_not_found", "queue_full", "adapter_not_found"}:
            self.problems.append(f"{kind}: {error}")


class Soak:
    """Sends requests to one server; used from one event loop."""

    def __init__(self, url: str, adapters: Mapping[str, Path], *, seed: int = 0) -> None:
        """Args:
        adapters: folders of adapters to upload, by the names they shall have.
        """
        self.tally = Tally()
        self._url = url
        self._names = sorted(adapters)
        self._files = {
            name: [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
            for name, folder in adapters.items()
        }
        self._random = random.Random(seed)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        self._http = httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, limits=limits)
        self._actions: Mapping[str, Callable[[], Awaitable[None]]] = {
            kind: getattr(self, f"_{kind}") for kind in MIX
        }

    async def run(
        self, num_requests: int, concurrency: int, on_progress: Callable[[int], None] | None = None
    ) -> None:
        """Upload all adapters, then send so many requests."""
        for name in self._names:
            await self._put(name)
        kinds = self._random.choices([*MIX], weights=[*MIX.values()], k=num_requests)
        pending = iter(enumerate(kinds))

        async def work() -> None:
            for index, kind in pending:
                self.tally.kinds[kind] += 1
                try:
                    await self._actions[kind]()
                except (httpx.HTTPError, AssertionError, KeyError, ValueError) as error:
                    self.tally.problems.append(f"{kind}: {error!r}")
                if on_progress is not None:
                    on_progress(index)

        await asyncio.gather(*(work() for _ in range(concurrency)))

    async def close(self) -> None:
        """Delete all adapters and close the connections."""
        for name in self._names:
            answer = await self._http.delete(f"/v1/adapters/{name}")
            self.tally.expect("last delete", answer, 200, 404)
        await self._http.aclose()

    # ---- generation --------------------------------------------------------------------------

    def _body(self, *, stream: bool, max_tokens: int = 48) -> dict[str, Any]:
        draw = self._random
        words = " ".join(draw.choices(("hello", "world", "STOP", "sea"), k=draw.randint(1, 60)))
        is_endless = draw.random() < 0.5
        return {
            "model": draw.choice([*self._names, "tiny"]),
            "prompt": f"Of {draw.randint(0, 5)}: {words}",
            "max_tokens": draw.randint(1, max_tokens),
            "n": draw.choice((1, 1, 1, 1, 2, 3)),
            "temperature": draw.choice((0, 1)),
            "stream": stream,
            **({"ignore_eos": True} if is_endless else {"stop": ["e", "zz"]}),
        }

    async def _whole(self) -> None:
        body = self._body(stream=False)
        await self._post("whole", body, body["n"])

    async def _fan_out(self) -> None:
        body = {**self._body(stream=False), "models": self._random.sample(self._names, 2)}
        del body["model"]
        await self._post("fan_out", body, 2 * body["n"])

    async def _post(self, kind: str, body: dict[str, Any], num: int) -> None:
        answer = await self._http.post("/v1/completions", json=body)
        if self.tally.expect(kind, answer, 200, 404, 409, 429):
            choices = answer.json()["choices"]
            assert [choice["index"] for choice in choices] == list(range(num))
            for choice in choices:
                self.tally.ended[choice["finish_reason"]] += 1
        else:
            self.tally.end_by_error(kind, answer.json()["error"], num)

    async def _stream(self, body: dict[str, Any] | None = None, kind: str = "stream") -> None:
        body = body or self._body(stream=True)
        allowed = (200, 404, 409, 429, 504) if kind == "deadline" else (200, 404, 409, 429)
        async with self._http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                self.tally.expect(kind, answer, *allowed)
                self.tally.end_by_error(kind, answer.json()["error"], body["n"])
                return
            events = [line[6:] async for line in answer.aiter_lines() if line]
        self.tally.expect(kind, answer, 200)
        self._book_events(kind, events, body["n"])

    def _book_events(self, kind: str, events: list[str], num: int) -> None:
        assert events[-1] == "[DONE]", f"the stream ends with {events[-1:]}"
        chunks = [json.loads(event) for event in events[:-1]]
        errors = [chunk["error"] for chunk in chunks if "error" in chunk]
        ends = [
            (choice["index"], choice["finish_reason"])
            for chunk in chunks
            for choice in chunk.get("choices", ())
            if choice["finish_reason"] is not None
        ]
        assert len(errors) <= 1, f"{len(errors)} terminal errors"
        assert len({index for index, _ in ends}) == len(ends), f"a sequence ended twice: {ends}"
        for _, reason in ends:
            self.tally.ended[reason] += 1
        if errors:
            assert "error" in chunks[-1], "the stream went on behind its error"
            self.tally.end_by_error(kind, errors[0], num - len(ends))
        else:
            assert len(ends) == num, f"{len(ends)} of {num} sequences ended"

    async def _deadline(self) -> None:
        body = self._body(stream=True, max_tokens=400)
        body["deadline_s"] = self._random.choice((0.001, 0.05, 0.3))
        await self._stream(body, "deadline")

    async def _bad_body(self) -> None:
        headers = {"content-type": "application/json"}
        body = self._random.choice(_BAD_BODIES)
        answer = await self._http.post("/v1/completions", content=body, headers=headers)
        self.tally.expect("bad_body", answer, 400, 429)

    async def _unknown_model(self) -> None:
        body = {**self._body(stream=True), "model": f"nobody-{self._random.randint(0, 9)}"}
        answer = await self._http.post("/v1/completions", json=body)
        self.tally.expect("unknown_model", answer, 404, 429)

    # ---- leaving -----------------------------------------------------------------------------

    async def _leave(self) -> None:
        """Go at any moment: while it waits, loads, is prefilled, decodes or is complete."""
        body = self._body(stream=self._random.random() < 0.7, max_tokens=400)
        self.tally.unseen += body["n"]
        raw = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(raw)}\r\n"
        data = head.encode() + b"content-type: application/json\r\n\r\n" + raw
        await self._send_and_go(data, self._random.choice((0, 0.002, 0.01, 0.05, 0.2)))

    async def _leave_early(self) -> None:
        """Go before the request is complete."""
        raw = json.dumps(self._body(stream=True)).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(raw)}\r\n\r\n"
        data = head.encode() + raw
        await self._send_and_go(data[: self._random.randint(0, len(data) - 1)], 0.002)

    async def _leave_upload(self) -> None:
        head = b"POST /v1/adapters HTTP/1.1\r\nhost: a\r\ncontent-length: 100000\r\n"
        kind = b"content-type: multipart/form-data; boundary=b\r\n\r\n"
        part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.safetensors"'
        await self._send_and_go(head + kind + part + b"\r\n\r\n" + bytes(5000), 0.01)

    async def _send_and_go(self, data: bytes, wait_s: float) -> None:
        host, port = self._url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        await asyncio.sleep(wait_s)
        if self._random.random() < 0.5:
            writer.transport.abort()  # or the end comes after what was sent
        writer.close()

    # ---- adapters ----------------------------------------------------------------------------

    async def _put(self, name: str) -> None:
        fields = {"name": name, "replace": "true"}
        files = self._files[self._random.choice(self._names)]
        answer = await self._http.post("/v1/adapters", data=fields, files=files)
        self.tally.expect("upload", answer, 200, 201, 429)

    async def _upload(self) -> None:
        await self._put(self._random.choice(self._names))

    async def _delete(self, mode: str) -> None:
        name = self._random.choice(self._names)
        answer = await self._http.delete(f"/v1/adapters/{name}", params={"mode": mode})
        self.tally.expect(f"delete_{mode}", answer, 200, 404)
        await self._put(name)

    async def _delete_drain(self) -> None:
        await self._delete("drain")

    async def _delete_cancel(self) -> None:
        await self._delete("cancel")

    async def _prefetch(self) -> None:
        name = self._random.choice(self._names)
        answer = await self._http.post(f"/v1/adapters/{name}/prefetch")
        self.tally.expect("prefetch", answer, 202, 404)
