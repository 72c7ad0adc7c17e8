"""Damage to `adapter_config.json`: first to its fields and values, then to its text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from loraplex_server.adapters.formats.registry import READERS, REFUSED
from tests.support.fuzz_corpus import SeedAdapter

Config = dict[str, Any]

NUMBERS: Sequence[Any] = (
    *(0, 1, 2, 3, 4, 5, 7, 8, 16, 17, 64, 255, 256, 257, 1024, -1, -8, -(2**31), -(2**63)),
    *(2**16, 2**20, 2**26, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**400),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -2.5, 1e-320, 1e-30, 1e20, 9e29, 1e30, 1e38, 1e308, 4.0, 16.0),
)
TEXTS: Sequence[str] = (
    *("", "none", "all", "lora_only", "all-linear", "q_proj", "up_proj", "down_proj", "lm_head"),
    *("embed_tokens", "model.norm", "norm", "proj", ".", "..", "../../etc/passwd", "/", "\0", "\n"),
    *("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "lora_ga", "loftq", "eva", "mica"),
    *("bat", "mini", "relu", "qr", "poly", "true", "null", "CAUSAL_LM", "SEQ_CLS", "tiny-llama"),
    *("\u202egnp.exe", "\u0130\u0131\u212a", "\ufeff", "\u200b", "e\u0301", "\U0001f4a9", "\x7f"),
    *("q_proj\u0000", "%s%n{0}{}", "__class__", "${HOME}", "'; DROP TABLE adapters; --"),
)
#: Expressions over which backtracking matchers hang, and what this dialect does not have.
REGEXES: Sequence[str] = (
    *("(a+)+$", "(.*)*", "(.*.*.*)*x", "((a|a)*)*b", "(.*a){30}", "(.?){9999}", ".{9999}", "(.*)+"),
    *("(", ")", "[", "[]", "[^]", "[z-a]", "*", "+?", "a**", "a{2,1}", "a{10001}", "a{99999}", "|"),
    *(
        r"\1",
        r"\Z",
        r"\p{L}",
        "(?=a)",
        "(?P<n>a)",
        "(?i)a",
        "(?:)",
        "(?:a|b)*?",
        r"\b\b",
        "^*",
        "$",
    ),
    *(
        "||||",
        "(|)",
        "(^|$)+",
        r"[\w.]+\.(q|k|v)_proj",
        ".*",
        ".*_proj",
        r"\d",
        r"layers\.[01]\..*",
    ),
    *("(" * 39 + "a" + ")" * 39, "(" * 60 + ")" * 60, "(a?){40}a{40}", "(.*){9}" * 9, "q" * 20_001),
    *("((.*){99}){99}", "(((.?){99}){99}){99}", "a|" * 3000, "[a-z]" * 999, "(.+)+" * 50),
)


def any_value(rng: Random, depth: int = 0) -> Any:
    """Return a value of any type."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind == 3:
        return rng.choice((None, True, False))
    if kind == 4:
        return rng.choice(REGEXES)
    if kind == 5:
        return rng.choice(TEXTS)
    items = range(rng.choice((0, 1, 1, 2, 3)))
    if kind == 6:
        return [any_value(rng, depth + 1) for _ in items]
    if kind == 7:
        return {rng.choice((*TEXTS, *REGEXES)): any_value(rng, depth + 1) for _ in items}
    return [rng.choice(NUMBERS[:20]) for _ in range(rng.randrange(6))]


def damage_config(rng: Random, seed: SeedAdapter, others: Sequence[SeedAdapter]) -> Config:
    """Return the fields of an adapter after a few changes."""
    config = dict(seed.config)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        config = rng.choice(_CHANGES)(rng, config, rng.choice(others))
    return config


def _set_own(rng: Random, config: Config, other: SeedAdapter) -> Config:
    return {**config, rng.choice((*config, "r")): any_value(rng)}


def _set_others(rng: Random, config: Config, other: SeedAdapter) -> Config:
    field = rng.choice(list(other.config))
    return {**config, field: rng.choice((other.config[field], any_value(rng)))}


def _set_number(rng: Random, config: Config, other: SeedAdapter) -> Config:
    fields = [field for field, value in config.items() if type(value) in (int, float)]
    if not fields:
        return {**config, "r": rng.choice(NUMBERS)}
    field = rng.choice(fields)
    near = config[field] + rng.choice((-1, 1)), config[field] * 2
    return {**config, field: rng.choice((*near, rng.choice(NUMBERS)))}


def _set_patterns(rng: Random, config: Config, other: SeedAdapter) -> Config:
    field = rng.choice(("rank_pattern", "rank_pattern", "alpha_pattern"))
    patterns = {rng.choice((*REGEXES, *TEXTS)): rng.choice(NUMBERS) for _ in range(4)}
    return {**config, field: patterns}


def _set_targets(rng: Random, config: Config, other: SeedAdapter) -> Config:
    field = rng.choice(
        ("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules")
    )
    return {**config, field: rng.choice((*REGEXES, list(TEXTS), list(REGEXES)))}


def _set_unknown(rng: Random, config: Config, other: SeedAdapter) -> Config:
    return {**config, rng.choice((*TEXTS, "x" * 9000, "\u00e9" * 300)): any_value(rng)}


def _set_kind(rng: Random, config: Config, other: SeedAdapter) -> Config:
    return {**config, "peft_type": rng.choice((*READERS, *READERS, *REFUSED, "lora", "LORA "))}


def _drop(rng: Random, config: Config, other: SeedAdapter) -> Config:
    gone = rng.choice(list(config) or ["r"])
    return {field: value for field, value in config.items() if field != gone}


def _swap_values(rng: Random, config: Config, other: SeedAdapter) -> Config:
    if not config:
        return config
    first, second = rng.choice(list(config)), rng.choice(list(config))
    return {**config, first: config[second], second: config[first]}


def _become_other(rng: Random, config: Config, other: SeedAdapter) -> Config:
    return dict(other.config)


def _flood(rng: Random, config: Config, other: SeedAdapter) -> Config:
    """As much of one thing as fits into the limit on bytes, or the limit on patterns."""
    if rng.random() < 0.9:
        return _set_own(rng, config, other)
    count = rng.choice((300, 19_999, 20_001, 60_000))
    names = [rng.choice(("m{}", "[a{}]", "({}", "q_proj{}.*")).format(i) for i in range(count)]
    field = rng.choice(("rank_pattern", "alpha_pattern", "target_modules", "modules_to_save"))
    if "pattern" in field:
        return {**config, field: dict.fromkeys(names, rng.choice((4, 4, 0, "x")))}
    return {**config, field: names}


_CHANGES: Sequence[Callable[[Random, Config, SeedAdapter], Config]] = (
    *(_set_own, _set_own, _set_others, _set_number, _set_number, _set_patterns, _set_targets),
    *(_set_unknown, _set_kind, _drop, _drop, _swap_values, _become_other, _flood),
)


def config_text(config: Config) -> bytes:
    """Return it as JSON."""
    return json.dumps(config).encode()


def damage_text(rng: Random, text: bytes) -> bytes:
    """Return JSON, or what is nearly that, after one change of the text."""
    return rng.choice(_TEXT_CHANGES)(rng, text)


def _insert_field(rng: Random, text: bytes) -> bytes:
    """Values that no encoder would write, and keys that are there already."""
    value = rng.choice((b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"01", b"0x10"))
    odd = rng.choice((b'"\\ud800"', b'"\\udc00\\ud800"', b'"\xff"', b'"\x01"', b"1" * 4299, b"-"))
    key = rng.choice((b'"r"', b'"x"', b'"peft_type"', b'"\\ud800"', b'"\\u0072"', b"r", b'""'))
    return b"{" + key + b": " + rng.choice((value, odd, _nest(rng))) + b", " + text.lstrip(b"{")


def _nest(rng: Random) -> bytes:
    depth = rng.choice((5, 100, 700, rng.randrange(850, 1000), 100_000))
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    return opening * depth + b"0" + closing * depth


def _flip(rng: Random, text: bytes) -> bytes:
    broken = bytearray(text or b"{")
    for _ in range(rng.randrange(1, 5)):
        broken[rng.randrange(len(broken))] = rng.randrange(256)
    return bytes(broken)


_TEXT_CHANGES: Sequence[Callable[[Random, bytes], bytes]] = (
    _insert_field,
    _insert_field,
    _insert_field,
    _flip,
    lambda rng, text: text[: rng.randrange(len(text) + 1)],
    lambda rng, text: b"\xef\xbb\xbf" + text,
    lambda rng, text: text.decode(errors="replace").encode(rng.choice(("utf-16", "utf-32-le"))),
    lambda rng, text: text + rng.choice((b"\0", b" " * 1000, b"{}", b" " * (1 << 20))),
    lambda rng, text: rng.choice((b"", b"[]", b"null", b'"LORA"', b"[" + text + b"]", b"0")),
)
