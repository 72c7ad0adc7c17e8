from __future__ import annotations

import json

import pytest

from loraplex_server.ray_serve.adapter_key import adapter_key, is_worth_knowing

BASE = frozenset({"base", "org/base"})
CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"model": "pirate"}, "pirate"),
        ({"model": "pirate@sha256:abc"}, "pirate@sha256:abc"),
        ({"model": "base"}, ""),
        ({"model": "org/base", "adapter_id": "sql"}, "sql"),
        ({"model": "base", "lora_path": "sql"}, "sql"),
        ({"model": "base", "adapters": [{"name": "sql", "weight": 1}, {"name": "x"}]}, "sql"),
        ({"inputs": "hello", "parameters": {"adapter_id": "sql"}}, "sql"),
        ({"lora_name": "sql", "lora_path": None}, "sql"),
        ({"lora_name": "sql", "lora_path": "/files/of/sql"}, "sql"),
        ({"models": ["base", "sql", "pirate"]}, "sql"),
        ({"model": None, "adapters": [], "parameters": 3}, ""),
        ({"model": ["pirate"]}, ""),
        ({"model": {"name": "pirate"}}, ""),
        (["pirate"], ""),
        ("pirate", ""),
    ],
)
def test_the_key_is_the_first_adapter_that_a_body_names(fields, key):
    assert adapter_key(CHAT, json.dumps(fields).encode(), BASE) == key


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe{", b"[" * 100_000])
def test_what_is_no_json_names_none(body):
    assert adapter_key(CHAT, body, BASE) == ""


def test_a_prefetch_goes_where_the_requests_will_go():
    assert adapter_key("/v1/adapters/acme/support/prefetch", b"", BASE) == "acme/support"
    assert adapter_key("/v1/adapters/acme/support", b"", BASE) == ""


def test_only_what_an_adapter_may_be_called_and_what_needs_a_key_is_told_to_all_routers():
    assert is_worth_knowing("POST", "pirate@sha256:" + "0" * 64)
    assert not is_worth_knowing("POST", "")
    assert not is_worth_knowing("POST", "x" * 257)
    # Anybody may send these, with any header or body, and they succeed.
    assert not is_worth_knowing("GET", "pirate")
