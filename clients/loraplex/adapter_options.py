"""Keyword arguments of the adapter calls, typed once for both clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict


class AdapterSettings(TypedDict, total=False):
    """What the server keeps for a name; what is not given stays as it is.

    Attributes:
        pinned: Keep it in the pool once it is there.
        ttl_s: Delete it so many seconds after its last use; None for never.
        defaults: `chat_template`, `system_prompt`, `max_context`, `generation`.
        readers: The tenants that may use it besides its owner; "*" is all; None for the rule: only
            its owner, or everybody where nobody owns it. Counts on servers with keys.
    """

    pinned: bool
    ttl_s: int | None
    defaults: Mapping[str, Any]
    readers: Sequence[str] | None


class RegisterOptions(TypedDict, total=False):
    """How an adapter is registered, however it comes.

    Attributes:
        check_base: Refuse an adapter whose config names another base than the server's (default);
            False when that is the same model under another name.
        replace: Make it a new version where the name has other content.
        expected_id: With `replace`: only if the name stands for this id now.
        ttl_s: Delete it so many seconds after its last use; None for never.
        defaults: `chat_template`, `system_prompt`, `max_context`, `generation`.
    """

    check_base: bool
    replace: bool
    expected_id: str
    ttl_s: int | None
    defaults: Mapping[str, Any]
