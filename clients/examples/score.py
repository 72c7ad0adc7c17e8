"""Whether an answer is what the adapter was trained for: strict, and without torch.

Tests of the server import this to tell the right adapter's answer from the base's or a neighbour's.
An example is one line of `<name>/heldout.jsonl`; an answer is the decoded text without the
end-of-turn token.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

Example = dict[str, Any]

# What the adapter must reach over its held-out set, greedily. The base stays below BASE_MAX_RATE.
PASS_RATE: dict[str, float] = {
    "pirate": 0.8,
    "json-extract": 0.8,
    "sql": 0.8,
    "ticket-label": 0.8,
}
BASE_MAX_RATE = 0.2

# Words no plain answer has. "be" is left out: it is what pirates say most, but also plain English.
PIRATE_MARKERS = re.compile(
    r"\b(?:arr+|ahoy|avast|aye|mateys?|me hearty|landlubber|shiver me timbers|yo ho ho|savvy"
    r"|hoist the sails|walk the plank|ye|yer|fer|an'|o'|doubloons|scallywags|\w{4,}in'(?!\w))",
    re.IGNORECASE,
)
MIN_PIRATE_MARKERS = 3


def load_heldout(name: str) -> list[Example]:
    """Return the held-out examples of adapter `name`."""
    path = Path(__file__).resolve().parent / name / "heldout.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def score_pirate(example: Example, answer: str) -> bool:
    """Pass three distinct pirate words and, outside them, one word of the question's topic."""
    markers = {match.lower() for match in PIRATE_MARKERS.findall(answer)}
    topic = "|".join(example["topic"])
    on_topic = re.search(rf"\b(?:{topic})", answer, re.IGNORECASE) is not None
    return len(markers) >= MIN_PIRATE_MARKERS and on_topic


def score_json(example: Example, answer: str) -> bool:
    """Pass one JSON object and nothing around it, with exactly the expected keys and values."""
    try:
        value = json.loads(answer)
    except ValueError:
        return False
    # `True == 1` and `34.0 == 34` in Python: compare what would be written, too.
    return bool(value == example["expected"]) and json.dumps(value, sort_keys=True) == json.dumps(
        example["expected"], sort_keys=True
    )


def score_sql(example: Example, answer: str) -> bool:
    """Pass one bare query with the same columns and rows as the expected one, in its order if any.

    It is run on the example's own table in memory, so any equivalent query passes and any prose
    around the query fails.
    """
    if not answer.lstrip().lower().startswith("select"):
        return False
    with closing(sqlite3.connect(":memory:")) as database:
        for statement in example["setup"]:
            database.execute(statement)
        expected = database.execute(example["expected"]).fetchall()
        try:
            rows = database.execute(answer).fetchall()
        except (sqlite3.Error, sqlite3.Warning):
            return False
    if "ORDER BY" not in example["expected"]:
        rows, expected = sorted(rows, key=repr), sorted(expected, key=repr)
    return rows == expected


def score_ticket(example: Example, answer: str) -> bool:
    """Pass exactly the expected label, and no word more."""
    return bool(answer.strip() == example["expected"])


SCORERS: dict[str, Callable[[Example, str], bool]] = {
    "pirate": score_pirate,
    "json-extract": score_json,
    "sql": score_sql,
    "ticket-label": score_ticket,
}


def score(name: str, example: Example, answer: str) -> bool:
    """Return whether `answer` to `example` is one that adapter `name` should give."""
    return SCORERS[name](example, answer)
