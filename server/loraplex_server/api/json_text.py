"""JSON as we write it on the wire: without spaces, since a stream repeats it for every token."""

from __future__ import annotations

import json
from typing import Any

_encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def compact(value: Any) -> str:
    """Return `value` as JSON in ASCII."""
    return _encoder.encode(value)
