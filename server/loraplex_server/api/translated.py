"""Bodies of other endpoints as the chat request that asks for the same."""

from __future__ import annotations

from typing import Protocol

from pydantic import ValidationError

from loraplex_server.api.chat_schemas import ChatBody
from loraplex_server.api.errors import InvalidRequest


class TranslatableBody(Protocol):
    """A body that is a chat request in other words."""

    def for_chat(self) -> ChatBody:
        """Return the chat request; raises pydantic's ValidationError."""
        ...


def as_chat(body: TranslatableBody) -> ChatBody:
    """Return the chat request; raises InvalidRequest for what only the whole of it tells."""
    try:
        return body.for_chat()
    except ValidationError as error:
        first = error.errors()[0]
        param = first.get("ctx", {}).get("param") or ".".join(map(str, first["loc"]))
        raise InvalidRequest(f"`{param}`: {first['msg']}", param=str(param)) from None
