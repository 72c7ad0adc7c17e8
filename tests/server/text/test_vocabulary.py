from __future__ import annotations

import threading
import time

import pytest

from loraplex_server.text.errors import ChatTemplateFailed, ChatTemplateMissing, UnknownToken
from loraplex_server.text.vocabulary import Vocabulary
from tests.support.tiny_tokenizer import make_tokenizer


def test_a_chat_is_rendered_up_to_the_answer(vocabulary):
    rendered = vocabulary.render_chat([{"role": "user", "content": "hi"}], {"prefill": "Sure: "})
    assert rendered == "<|start|>user\nhi<|end|>\n<|start|>assistant\nSure: "


def test_the_template_refusing_the_messages_is_a_typed_error(vocabulary):
    with pytest.raises(ChatTemplateFailed, match="no tools here"):
        vocabulary.render_chat([{"role": "tool", "content": "hi"}])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        # One step each, which nothing would end.
        ("{{ 1 if 3 ** 3 ** 30 }}", "raises to a power"),
        ("{% set x = 9 %}{{ x\n**\tx ** x**x }}", "raises to a power"),
        ("{{ 'a' * 10 ** 3 }}", "raises to a power"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "wants too much"),
        ("{{ 'a' * 1000000000000000000 }}", "wants too much"),
    ],
)
def test_a_template_that_would_stop_the_server_is_refused(vocabulary, template, reason):
    with pytest.raises(ChatTemplateFailed, match=reason):
        vocabulary.render_chat([{"role": "user", "content": "hi"}], template=template)


def test_a_template_may_hand_arguments_on_and_write_stars(vocabulary):
    template = "{% macro f(a) %}**{{ a }}**{% endmacro %}{{ f(**{'a': 1}) }}{{ dict(a=2, **{}).a }}"
    assert vocabulary.render_chat([{"role": "user"}], template=template) == "**1**2"


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "add_generation_prompt"])
def test_template_arguments_cannot_replace_the_template(vocabulary, name):
    with pytest.raises(ChatTemplateFailed, match=name):
        vocabulary.render_chat([{"role": "user", "content": "hi"}], {name: "x"})


def test_a_model_without_template_says_so():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ChatTemplateMissing, match="/v1/completions"):
        Vocabulary(tokenizer).render_chat([{"role": "user", "content": "hi"}])


def test_ids_outside_the_vocabulary_are_refused(vocabulary):
    vocabulary.check([0, len(vocabulary) - 1], param="prompt")
    for bad in (-1, len(vocabulary)):
        with pytest.raises(UnknownToken, match=str(bad)):
            vocabulary.check([0, bad], param="prompt")


def test_tokens_are_shown_as_text_or_bytes(vocabulary):
    first, *_ = vocabulary.encode("é")
    [world] = vocabulary.encode(" world")
    assert vocabulary.token_text(first) == "bytes:\\xc3"
    assert vocabulary.token_bytes(first) == b"\xc3"
    assert vocabulary.token_text(world) == " world"
    assert vocabulary.token_text(0) == "<|end|>"


def test_other_threads_go_on_while_a_long_text_is_encoded(vocabulary):
    # Whoever else computes here may hold up this thread once; encoding would each time.
    assert any(longest_wait_for_encoding(vocabulary) < 0.5 for _ in range(5))


def longest_wait_for_encoding(vocabulary) -> float:
    """Return for what share of the time that a long text takes this thread did not run."""
    text = "hello world, " * 200_000
    took_s: list[float] = []

    def encode() -> None:
        started = time.perf_counter()
        vocabulary.encode(text)
        took_s.append(time.perf_counter() - started)

    thread = threading.Thread(target=encode)
    longest_s, last = 0.0, time.perf_counter()
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        longest_s, last = max(longest_s, now - last), now
    return longest_s / took_s[0]


def test_a_text_has_at_least_the_tokens_that_its_length_allows(vocabulary):
    assert vocabulary.least_tokens("") == 0
    for text in ("hello", "<|system|>" * 7, " world" * 100):
        assert 0 < vocabulary.least_tokens(text) <= len(vocabulary.encode(text))
