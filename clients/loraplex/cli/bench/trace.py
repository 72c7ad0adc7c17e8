"""Traces of real traffic: CSV with a line of names, or JSON lines, with the same fields.

| field | other name | |
|---|---|---|
| `arrival` | `TIMESTAMP` | seconds from any start, or a date and time |
| `prompt_len` | `ContextTokens` | tokens |
| `output_len` | `GeneratedTokens` | tokens |
| `adapter` | | a name; empty or left out: drawn as without a trace |

The other names are those of the public Azure LLM inference traces, which can be used as they are.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loraplex.cli.bench.plan import Ask, Popularity
from loraplex.errors import UsageError

_OTHER_NAMES = {
    "timestamp": "arrival",
    "contexttokens": "prompt_len",
    "generatedtokens": "output_len",
}
_FIELDS = ("arrival", "prompt_len", "output_len")


def read_trace(path: Path, popularity: Popularity, speed: float, rng: random.Random) -> list[Ask]:
    """Return the requests of a trace in the order they arrive, the first at 0.

    Args:
        path: A .csv or .jsonl file.
        popularity: Draws the model where the trace names none.
        speed: How many times as fast as it was it is played.
        rng: What it draws with.

    Raises:
        UsageError: It cannot be read; the message has the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the trace {path}: {error}") from error
    asks = [_ask(path, number, row, popularity, rng) for number, row in _rows(path, text)]
    if not asks:
        raise UsageError(f"the trace {path} has no requests")
    asks.sort()
    first_s = asks[0][0]
    return [replace(ask, at_s=(at_s - first_s) / speed) for at_s, _, ask in asks]


def _rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the rows with their line numbers."""
    if path.suffix in (".jsonl", ".ndjson"):
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield number, _json_row(path, number, line)
    else:
        reader = csv.DictReader(text.splitlines())
        for row in reader:
            yield reader.line_num, row


def _json_row(path: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{path}, line {number}: {error}") from error
    if not isinstance(row, dict):
        raise UsageError(f"{path}, line {number}: no JSON object")
    return row


def _ask(
    path: Path, number: int, row: Mapping[str, Any], popularity: Popularity, rng: random.Random
) -> tuple[float, int, Ask]:
    """Return when it arrived, by which line, and what was asked."""
    named = {_OTHER_NAMES.get(str(k).lower(), str(k).lower()): v for k, v in row.items()}
    missing = [name for name in _FIELDS if named.get(name) in (None, "")]
    if missing:
        raise UsageError(f"{path}, line {number}: no {', no '.join(missing)}")
    try:
        at_s = _seconds(named["arrival"])
        prompt_len, output_len = (max(1, int(named[name])) for name in _FIELDS[1:])
    except ValueError as error:
        raise UsageError(f"{path}, line {number}: {error}") from error
    model = named.get("adapter") or popularity.draw(rng)
    return at_s, number, Ask(at_s, model, prompt_len, output_len)


def _seconds(value: Any) -> float:
    try:
        return float(value)
    except ValueError:
        when = datetime.fromisoformat(str(value))
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
