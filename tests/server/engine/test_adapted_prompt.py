"""What stands before a prompt, and where in it an adapter begins to matter."""

from __future__ import annotations

import pytest

from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.adapter_spec import KV_PREFIX, SOFT_PROMPT, AdapterSpec, Part
from loraplex_server.engine.adapted_prompt import AdaptedPrompt, adapt_prompt

RANKS = ((4,) * 7,) * 2


def manifest(**fields) -> AdapterManifest:
    return AdapterManifest("a", "/nowhere", AdapterSpec(RANKS, **fields))


def test_the_base_and_plain_adapters_get_the_prompt_as_it_is():
    plain = manifest()
    assert adapt_prompt(None, [3, 4], 100) == AdaptedPrompt(None, (3, 4))
    assert adapt_prompt(plain, [3, 4], 100) == AdaptedPrompt(plain, (3, 4))


@pytest.mark.parametrize(
    "part", [Part(SOFT_PROMPT, 3, 32), Part(KV_PREFIX, 3, 32, layers=(0, 1))], ids=lambda p: p.name
)
def test_virtual_tokens_come_first_with_ids_behind_the_vocabulary(part):
    tuned = manifest(parts=(part,))
    expected = AdaptedPrompt(tuned, (100, 101, 102, 7, 8), num_virtual=3)
    assert adapt_prompt(tuned, [7, 8], 100) == expected


@pytest.mark.parametrize(
    ("prompt", "start"),
    [
        ([1, 2, 9, 1, 2, 9], 3),
        ([1, 2], 0),
        ([5, 1, 2], 1),
        ([1, 1, 2], 1),
        ([2, 1], None),
        ([1], None),
    ],
)
def test_an_activated_adapter_starts_at_the_last_invocation_or_not_at_all(prompt, start):
    activated = manifest(invocation_token_ids=(1, 2))
    adapted = adapt_prompt(activated, prompt, 100)
    assert adapted.token_ids == tuple(prompt)
    assert adapted.adapter is (None if start is None else activated)
    assert adapted.adapter_start == (start or 0)
