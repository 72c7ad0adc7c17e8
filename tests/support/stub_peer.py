"""A server like those that ours is compared with, as a program: it streams what is asked for.

It keeps to what clients of the real ones must know: an adapter is refused until a call has loaded
it, with `--lora-field` an adapter is an index in `lora`, and `a0001` answers one token too few.
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar


class StubPeer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    loaded: ClassVar[set[str]] = set()
    num_adapters = 0
    has_lora_field = False

    def do_GET(self) -> None:
        answers = {
            "/v1/models": {"data": []},
            "/lora-adapters": [{"id": i} for i in range(self.num_adapters)],
        }
        self._json(200, answers[self.path])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/load_lora_adapter":
            self.loaded.add(body["lora_name"])
            self._json(200, {})
        elif self._knows(body):
            self._stream(body)
        else:
            self._json(404, {"error": {"message": "no such adapter"}})

    def _knows(self, body: dict) -> bool:
        if self.has_lora_field:
            return 0 <= body["lora"][0]["id"] < max(1, self.num_adapters)
        return body["model"] == "base" or body["model"] in self.loaded

    def _stream(self, body: dict) -> None:
        num_tokens = body["max_tokens"] - (body["model"] == "a0001")
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": num_tokens}
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()
        for _ in range(num_tokens):
            self._chunk(json.dumps({"choices": [{"text": "x", "finish_reason": None}]}))
        self._chunk(json.dumps({"choices": [], "usage": usage}))
        self._chunk("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, text: str) -> None:
        data = f"data: {text}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _json(self, status: int, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--adapters", type=int, default=0)
    parser.add_argument("--lora-field", action="store_true")
    options = parser.parse_args()
    StubPeer.num_adapters, StubPeer.has_lora_field = options.adapters, options.lora_field
    ThreadingHTTPServer(("127.0.0.1", options.port), StubPeer).serve_forever()


if __name__ == "__main__":
    main()
