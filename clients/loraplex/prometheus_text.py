"""Prometheus' text format (version 0.0.4), read without its client library. Pure.

One sample per line: `name{label="value",...} number [timestamp]`, after `# HELP` and `# TYPE`
lines of its family. A histogram's samples are `_bucket`, `_sum` and `_count` of the family's name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?")
_LABEL = re.compile(r'\s*([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"\s*(?:,|$)')
_ESCAPE = re.compile(r"\\(.)")
_SUFFIXES = ("_bucket", "_sum", "_count", "_total", "_created")


@dataclass
class Family:
    """The samples of one metric as (full name, labels, value), in the order of the text."""

    name: str
    kind: str = "untyped"
    help: str = ""
    samples: list[tuple[str, dict[str, str], float]] = field(default_factory=list)


def parse_families(text: str) -> list[Family]:
    """Return the families of a scrape.

    Raises:
        ValueError: A line is no sample and no comment.
    """
    families: dict[str, Family] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#"):
            _read_comment(line, families)
        elif line.strip():
            name, labels, value = _read_sample(line, number)
            _family_of(name, families).samples.append((name, labels, value))
    return list(families.values())


def _read_comment(line: str, families: dict[str, Family]) -> None:
    words = line.split(maxsplit=3)
    if len(words) < 3 or words[1] not in ("HELP", "TYPE"):
        return
    family = families.setdefault(words[2], Family(words[2]))
    told = words[3] if len(words) > 3 else ""
    if words[1] == "TYPE":
        family.kind = told
    else:
        family.help = _unescaped(told)


def _read_sample(line: str, number: int) -> tuple[str, dict[str, str], float]:
    match = _SAMPLE.fullmatch(line.strip())
    if match is None:
        raise ValueError(f"line {number} is no Prometheus sample: {line[:80]!r}")
    name, labels, value = match.groups()
    return name, _read_labels(labels or "", number), float(value)


def _read_labels(text: str, number: int) -> dict[str, str]:
    labels: dict[str, str] = {}
    at = 0
    while text[at:].strip():
        match = _LABEL.match(text, at)
        if match is None:
            raise ValueError(f"line {number} has labels that are none: {text[at : at + 80]!r}")
        labels[match[1]] = _unescaped(match[2])
        at = match.end()
    return labels


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(lambda match: "\n" if match[1] == "n" else match[1], text)


def _family_of(name: str, families: dict[str, Family]) -> Family:
    """Return the family a sample belongs to: declared under its name, or without a suffix."""
    if name in families:
        return families[name]
    for suffix in _SUFFIXES:
        if name.endswith(suffix) and name.removesuffix(suffix) in families:
            return families[name.removesuffix(suffix)]
    return families.setdefault(name, Family(name))
