"""From what a flag, a variable or a TOML file says to the value of a setting.

Every `Parser` takes the raw value, a text or whatever TOML knows, and returns the
checked one; the message of its ValueError completes "must be ...". Other functions make a `Parser`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

Parser = Callable[[Any], Any]

#: A number for every tenant, or numbers by tenant; "*" is whoever is not named, 0 if nobody is.
TenantLimit = int | Mapping[str, int]

_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12} | {
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
#: What RFC 9110 calls a token.
_HEADER_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


def parse_text(raw: Any) -> str:
    """Take a text that says something."""
    if not isinstance(raw, str) or not raw:
        raise ValueError("a non-empty text")
    return raw


def parse_secret(raw: Any) -> str:
    """Take a key that a header can carry."""
    key = raw.strip() if isinstance(raw, str) else ""
    if not key or not all("!" <= char <= "~" for char in key):
        raise ValueError("a text of printable ASCII characters without spaces")
    return str(key)


def parse_folder(raw: Any) -> Path:
    """Take a path, which may begin with `~`."""
    return Path(parse_text(raw)).expanduser().absolute()


def parse_store_url(raw: Any) -> str:
    """Take a URL, or a folder that does not depend on where the server was started.

    So a misspelt URL (`s3:/bucket`) is not taken for a folder of this machine.
    """
    text = parse_text(raw)
    if "://" not in text and not Path(text).expanduser().is_absolute():
        raise ValueError("a URL such as s3://bucket/folder, or a folder from the root on")
    return text


def parse_header_name(raw: Any) -> str:
    """Take the name of an HTTP header, whose case does not matter."""
    if not isinstance(raw, str) or not _HEADER_NAME.fullmatch(raw):
        raise ValueError("the name of an HTTP header, such as x-tenant")
    return raw.lower()


def parse_http_url(raw: Any) -> str:
    """Take a URL of HTTP, without a name or a password, which logs and flags would show."""
    parts = urlsplit(raw) if isinstance(raw, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("a URL such as http://localhost:4318")
    if parts.username is not None or parts.password is not None:
        raise ValueError("a URL without a password; set OTEL_EXPORTER_OTLP_HEADERS instead")
    return str(raw)


def parse_switch(raw: Any) -> bool:
    """Take `on` or `off`, in TOML a boolean too."""
    if isinstance(raw, bool):
        return raw
    if raw not in ("on", "off"):
        raise ValueError("on or off")
    return bool(raw == "on")


def parse_seconds(raw: Any) -> float:
    """Take a number of seconds above 0."""
    value = _number(raw)
    if not value > 0:
        raise ValueError("a number of seconds above 0")
    return value


def parse_wait(raw: Any) -> float:
    """Take a number of seconds that may be 0."""
    value = _number(raw)
    if not value >= 0:
        raise ValueError("a number of seconds, 0 or above")
    return value


def parse_share(raw: Any) -> float:
    """Take a number from 0 to 1."""
    value = _number(raw)
    if not 0 <= value <= 1:
        raise ValueError("a number from 0 to 1")
    return value


def parse_size(raw: Any) -> int:
    """Take a number of bytes such as `1073741824`, `512MiB` or `1.5 GB`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", str(raw).strip().lower())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise ValueError("a size such as 512MiB or 2GB")
    return size


def parse_weights(raw: Any) -> Mapping[str, float]:
    """Take `gold=3,free=1`, in TOML a table too."""
    expected = "names with weights above 0, such as gold=3,free=1"
    pairs = raw.items() if isinstance(raw, Mapping) else _pairs(raw, expected)
    weights: dict[str, float] = {}
    for name, number in pairs:
        weight = _number(number)
        if not name or name in weights or not weight > 0:
            raise ValueError(expected)
        weights[name] = weight
    return weights


def per_tenant(parse: Parser) -> Parser:
    """Take one limit for all, or `1000,gold=5000`; in TOML a table, where `*` is the rest."""
    expected = "a limit, or one and those of tenants, such as 1000,gold=5000"

    def parse_limits(raw: Any) -> TenantLimit:
        if isinstance(raw, Mapping):
            return {str(tenant): parse(limit) for tenant, limit in raw.items()}
        if not isinstance(raw, str) or not set(raw) & {",", "="}:
            return int(parse(raw))
        parts = [part if "=" in part else f"*={part}" for part in raw.split(",")]
        limits = [(tenant, parse(limit)) for tenant, limit in _pairs(",".join(parts), expected)]
        if not all(tenant for tenant, _ in limits) or len(dict(limits)) < len(limits):
            raise ValueError(expected)
        return dict(limits)

    return parse_limits


def limit_of(limits: TenantLimit, tenant: str) -> int:
    """Return the limit of one tenant; 0 is none."""
    if isinstance(limits, int):
        return limits
    return limits.get(tenant, limits.get("*", 0))


def choice_of(*options: str) -> Parser:
    """Take one of these words."""

    def parse(raw: Any) -> str:
        if raw not in options:
            raise ValueError("one of " + ", ".join(options))
        return str(raw)

    return parse


def integer_of(low: int, high: int | None = None) -> Parser:
    """Take a whole number within these bounds, themselves included."""
    expected = f"a whole number of at least {low}" + (f", at most {high}" if high else "")

    def parse(raw: Any) -> int:
        if isinstance(raw, bool) or not re.fullmatch(r"[+-]?\d+", str(raw)):
            raise ValueError(expected)
        value = int(raw)
        if value < low or (high is not None and value > high):
            raise ValueError(expected)
        return value

    return parse


def or_word(word: str, meaning: Any, parse: Parser) -> Parser:
    """Accept `word` as well, which becomes `meaning`."""

    def parse_or_word(raw: Any) -> Any:
        if str(raw) == word:
            return meaning
        try:
            return parse(raw)
        except ValueError as error:
            raise ValueError(f"{word}, or {error}") from None

    return parse_or_word


def or_auto(parse: Parser) -> Parser:
    """Accept `auto` as well, which becomes None."""
    return or_word("auto", None, parse)


def _number(raw: Any) -> float:
    """Return a finite number, or one that compares with nothing."""
    try:
        value = math.nan if isinstance(raw, bool) else float(raw)
    except (TypeError, ValueError):
        return math.nan
    return value if math.isfinite(value) else math.nan


def _pairs(raw: Any, expected: str) -> list[tuple[str, str]]:
    if not isinstance(raw, str):
        raise ValueError(expected)
    split = [pair.partition("=") for pair in raw.split(",")]
    return [(name.strip(), number.strip()) for name, _, number in split]
