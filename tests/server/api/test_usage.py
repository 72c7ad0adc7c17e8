from __future__ import annotations

import pytest

from tests.server.api.conftest import BASE

MESSAGES = [{"role": "user", "content": "hello world"}]


def test_cached_tokens_are_told_and_none_is_told_too(server, client):
    answer = client.completions.create(model=BASE, prompt="hello world")
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    server.engine.num_cached = lambda request: len(request.prompt_token_ids) - 1
    answer = client.completions.create(model=BASE, prompt="hello world")
    assert answer.usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens - 1
    chat = client.chat.completions.create(model=BASE, messages=MESSAGES)
    assert chat.usage.prompt_tokens_details.cached_tokens == chat.usage.prompt_tokens - 1


def test_each_prompt_counts_once_by_its_first_sample(server, client):
    cached = {"-0": 1, "-1": 10, "-2": 10, "-3": 2, "-4": 10, "-5": 10}
    server.engine.num_cached = lambda request: cached[request.request_id[-2:]]
    answer = client.completions.create(model=BASE, prompt=["hello", "world"], n=3)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_a_stream_with_usage_tells_cached_tokens(server, client, kind):
    server.engine.num_cached = lambda request: 1
    options = {"model": BASE, "stream": True, "stream_options": {"include_usage": True}}
    if kind == "chat":
        chunks = [*client.chat.completions.create(messages=MESSAGES, **options)]
    else:
        chunks = [*client.completions.create(prompt="hello world", **options)]
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
