"""Which adapter a request is for, as far as its router must know; no judgement of the request.

A wrong guess costs a load on another replica and nothing else: the replica reads the request again,
and its word is final.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

#: Fields that name an adapter, those first that win where `model` is the base's name.
_NAMING_FIELDS: Final = ("adapter_id", "lora_name", "lora_path", "model")
#: More than a name and the digest of a version.
_MAX_KEY_LEN: Final = 256
_ADAPTERS_PATH: Final = "/v1/adapters/"
#: The one thing done to an adapter that is done in one replica's memory.
_PREFETCH: Final = "/prefetch"


def adapter_key(path: str, body: bytes, base_names: frozenset[str]) -> str:
    """Return the first adapter that a request names; "" for the base model and for none.

    Args:
        path: below the application's own prefix.
        body: JSON, or anything else, which names none.
        base_names: what requests may call the base model.
    """
    if path.startswith(_ADAPTERS_PATH) and path.endswith(_PREFETCH):
        return path.removeprefix(_ADAPTERS_PATH).removesuffix(_PREFETCH)
    try:
        fields = json.loads(body) if body else None
    except (ValueError, RecursionError):
        return ""
    named = (name for name in _names(fields) if isinstance(name, str) and name)
    return next((name for name in named if name not in base_names), "")


def is_worth_knowing(method: str, key: str) -> bool:
    """Return whether Serve should learn that a replica has answered with this key.

    Each one is sent to all routers and stays in Ray's metrics. So none of requests that need no API
    key or name no adapter, which are all of those that only read; and none that is no name.
    """
    return method == "POST" and 0 < len(key) <= _MAX_KEY_LEN


def _names(fields: Any) -> Iterator[Any]:
    if not isinstance(fields, dict):
        return
    mixture = fields.get("adapters")
    if isinstance(mixture, list) and mixture and isinstance(mixture[0], dict):
        yield mixture[0].get("name")
    several = fields.get("models")
    if isinstance(several, list):
        yield from several
    parameters = fields.get("parameters")  # where LoRAX has them
    if isinstance(parameters, dict):
        yield parameters.get("adapter_id")
    for field in _NAMING_FIELDS:
        yield fields.get(field)
