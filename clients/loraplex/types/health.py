"""Whether the server can answer, and what it is."""

from __future__ import annotations

from typing import Any, Self

from pydantic_core import from_json

from loraplex.types.base import ApiModel


class Health(ApiModel):
    """Whether the server can answer. `status` is "ok", or says what it is doing instead."""

    status: str

    @classmethod
    def from_body(cls, content: bytes) -> Self:
        """Read the answer; a refusal with an error body tells its message as the status."""
        body: Any = from_json(content)
        if isinstance(body, dict) and isinstance(body.get("error"), dict):
            body = {"status": body["error"].get("message", "not ready"), **body}
        return cls.model_validate(body)

    @property
    def is_ok(self) -> bool:
        """True when requests will be served."""
        return self.status == "ok"


class ServerVersion(ApiModel):
    """The answer of GET /version."""

    version: str
