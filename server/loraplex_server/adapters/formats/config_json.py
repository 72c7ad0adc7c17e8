"""`adapter_config.json` as strictly parsed JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from loraplex_server.adapters.errors import InvalidUpload

CONFIG_NAME: Final = "adapter_config.json"

#: PEFT's own configurations nest three levels.
_MAX_DEPTH: Final = 50


def load_config_json(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """Parse the file strictly: one object, no duplicate keys, no NaN or Infinity, only Unicode.

    Raises:
        InvalidUpload: it is missing, too large or not such JSON.
        OSError: the disk failed.
    """
    try:
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
        if len(text) > max_bytes:
            raise InvalidUpload(f"{CONFIG_NAME} is larger than {max_bytes} bytes")
        config = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        # JSON can write half a surrogate pair; no database, log or answer could.
        json.dumps(config, ensure_ascii=False).encode()
    except FileNotFoundError as error:
        raise InvalidUpload(f"{CONFIG_NAME} is missing") from error
    except (ValueError, RecursionError) as error:
        raise InvalidUpload(f"{CONFIG_NAME} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidUpload(f"{CONFIG_NAME} must hold one JSON object")
    if _is_deep(config):
        # What can just be parsed may be too deep to be shown in a message.
        raise InvalidUpload(f"{CONFIG_NAME} nests more than {_MAX_DEPTH} levels")
    return config


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [child for item in level for child in _children(item)]
    return bool(level)


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
