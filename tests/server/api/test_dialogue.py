"""Templates of requests, reasoning, and continued messages."""

from __future__ import annotations

import openai
import pytest

from tests.server.api.conftest import BASE, make_adapter, running_server
from tests.server.api.test_tools import CALL, WEATHER, prompt_of, says

HELLO = [{"role": "user", "content": "hello"}]
THINKER = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% endfor %}"
    "{% for d in documents or [] %}(doc {{ d.text }}){% endfor %}"
    "{% if reasoning_effort %}(effort {{ reasoning_effort }}){% endif %}"
    "{% if tools %}{{ tools | length }}<tool_call>{% endif %}"
    "{% if enable_thinking %}<think>\n{% endif %}"
)


@pytest.fixture
def thinker(server, client, tmp_path):
    """Return a function that asks an adapter whose template knows reasoning."""
    server.upload("thinker", make_adapter(tmp_path / "thinker"))
    with server.http() as http:
        http.patch("/v1/adapters/thinker", json={"defaults": {"chat_template": THINKER}})
    return lambda **fields: client.chat.completions.create(
        model="thinker", **{"messages": HELLO, **fields}
    )


def test_reasoning_is_told_apart_from_the_answer(server, thinker):
    says(server, "<think>\nhe is kind </think>\n\nhello")
    message = thinker().choices[0].message
    assert (message.content, message.reasoning) == ("hello", "he is kind")
    chunks = [chunk.choices[0].delta for chunk in thinker(stream=True)]
    assert "".join(getattr(d, "reasoning", None) or "" for d in chunks) == "he is kind"
    assert "".join(d.content or "" for d in chunks) == "hello"


def test_reasoning_may_begin_in_the_prompt_and_be_left_out(server, thinker):
    says(server, "hm </think> hello")
    fields = {"chat_template_kwargs": {"enable_thinking": True}}
    assert thinker(extra_body=fields).choices[0].message.reasoning == "hm"
    fields["include_reasoning"] = False
    message = thinker(extra_body=fields).choices[0].message
    assert message.content == "hello"
    assert not hasattr(message, "reasoning")


def test_a_call_may_follow_reasoning(server, thinker):
    says(server, f"<think>look it up</think>\n{CALL}")
    [choice] = thinker(tools=[WEATHER]).choices
    assert choice.finish_reason == "tool_calls"
    assert (choice.message.content, choice.message.reasoning) == (None, "look it up")


def test_an_answer_without_reasoning_loses_nothing(server, thinker):
    says(server, " <thin ice")
    assert thinker().choices[0].message.content == " <thin ice"


def test_what_the_template_knows_reaches_it(server, thinker):
    says(server, "hello")
    history = [
        *HELLO,
        {"role": "assistant", "content": "hi", "reasoning": "so"},
        *HELLO,
    ]
    thinker(
        messages=history,
        reasoning_effort="low",
        extra_body={"documents": [{"text": "one"}], "add_generation_prompt": False},
    )
    assert prompt_of(server) == (
        "[user]hello[assistant]<think>so</think>hi[user]hello(doc one)(effort low)"
    )


def test_a_final_message_is_continued_and_echoed(server, client):
    says(server, " world")
    messages = [*HELLO, {"role": "assistant", "content": "hello"}]
    fields = {"continue_final_message": True, "echo": True}
    answer = client.chat.completions.create(model=BASE, messages=messages, extra_body=fields)
    assert prompt_of(server).endswith("<|start|>assistant\nhello")
    assert answer.choices[0].message.content == "hello world"
    stream = client.chat.completions.create(
        model=BASE, messages=messages, extra_body=fields, stream=True
    )
    assert "".join(c.choices[0].delta.content or "" for c in stream) == "hello world"


def test_a_variable_that_the_template_does_not_know_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="does not know `color`"):
        client.chat.completions.create(
            model=BASE, messages=HELLO, extra_body={"chat_template_kwargs": {"color": "red"}}
        )


def test_a_requests_own_template_needs_trust(server, client, vocabulary, tmp_path):
    fields = {"chat_template": "{{ messages[0].content }}!"}
    with pytest.raises(openai.BadRequestError, match="trust_request_chat_template"):
        client.chat.completions.create(model=BASE, messages=HELLO, extra_body=fields)
    settings = {"trust_request_chat_template": True, "tool_parser": "none"}
    with (
        running_server(tmp_path, vocabulary, **settings) as trusting,
        trusting.openai() as client,
    ):
        client.chat.completions.create(model=BASE, messages=HELLO, extra_body=fields)
        assert prompt_of(trusting) == "hello!"
        endless = {"chat_template": "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4}
        with pytest.raises(openai.BadRequestError, match="stopped"):
            client.chat.completions.create(model=BASE, messages=HELLO, extra_body=endless)
        with pytest.raises(openai.BadRequestError, match="tool_parser"):
            client.chat.completions.create(model=BASE, messages=HELLO, tools=[WEATHER])
