from __future__ import annotations

import pytest

from loraplex_server.api.context_limit import ContextLimit
from loraplex_server.api.errors import ContextLengthExceeded
from loraplex_server.api.prompts import PromptEncoder
from loraplex_server.text.errors import UnknownToken
from tests.server.api.conftest import BASE


@pytest.fixture
def encoder(vocabulary) -> PromptEncoder:
    return PromptEncoder(vocabulary, ContextLimit.of(10))


def test_a_text_that_cannot_fit_is_refused_without_encoding_it(encoder, vocabulary, monkeypatch):
    monkeypatch.setattr(vocabulary, "encode", lambda *_, **__: pytest.fail("encoded"))
    with pytest.raises(ContextLengthExceeded, match=r"10 tokens, but .* has at least 10000"):
        encoder.encode("x" * 100_000, add_special_tokens=False)


def test_too_many_ids_are_refused_before_they_are_looked_at(encoder):
    with pytest.raises(ContextLengthExceeded, match="has 10;"):
        encoder.check([-1] * 10)
    with pytest.raises(UnknownToken):
        encoder.check([-1] * 9)


@pytest.mark.parametrize("prompt", ["x" * 100_000, [5] * 100_000])
def test_a_prompt_far_too_long_is_a_bad_request(server, prompt):
    answer = server.post("/v1/completions", {"model": BASE, "prompt": prompt})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_conversation_far_too_long_is_a_bad_request(server):
    messages = [{"role": "user", "content": "x" * 100_000}]
    answer = server.post("/v1/chat/completions", {"model": BASE, "messages": messages})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
