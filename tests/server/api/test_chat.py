from __future__ import annotations

import openai
import pytest

from tests.server.api.conftest import BASE

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "c0", "type": "function", "function": {"name": "f", "arguments": "{}"}}
NAMED_G = {"type": "function", "function": {"name": "g"}}
DEEP = {}
for _ in range(100):
    DEEP = {"a": DEEP}


def with_parameters(schema):
    return {"type": "function", "function": {"name": "f", "parameters": schema}}


@pytest.fixture(autouse=True)
def say_hello_world(server):
    """The model answers `hello world` to everything."""
    server.engine.reply = lambda request: server.vocabulary.encode("hello world")


def test_a_message_is_answered(server, client):
    answer = client.chat.completions.create(model=BASE, messages=HELLO)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "hello world")
    assert choice.finish_reason == "stop"
    assert answer.object == "chat.completion"
    prompt = server.vocabulary.render_chat(HELLO)
    assert answer.usage.prompt_tokens == len(server.vocabulary.encode(prompt))
    assert answer.usage.completion_tokens == 3


def test_the_answer_may_fill_the_context(server, client):
    client.chat.completions.create(model=BASE, messages=HELLO)
    [request] = server.engine.submitted
    room = server.engine.info.max_model_len - len(request.prompt_token_ids)
    assert request.sampling.max_tokens == room


def test_both_names_of_the_limit_work_but_not_together(server, client):
    client.chat.completions.create(model=BASE, messages=HELLO, max_tokens=1)
    client.chat.completions.create(model=BASE, messages=HELLO, max_completion_tokens=2)
    assert [r.sampling.max_tokens for r in server.engine.submitted] == [1, 2]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=BASE, messages=HELLO, max_tokens=1, max_completion_tokens=2
        )
    assert caught.value.param == "max_tokens"


def test_a_stream_has_the_shape_of_openais(client):
    stream = client.chat.completions.create(
        model=BASE, messages=HELLO, stream=True, stream_options={"include_usage": True}, n=2
    )
    chunks = list(stream)
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant"] * 2
    texts = ["", ""]
    for chunk in chunks[2:-1]:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        assert chunk.usage is None
    assert texts == ["hello world"] * 2
    finals = [c.choices[0] for c in chunks[:-1] if c.choices[0].finish_reason]
    assert sorted(choice.index for choice in finals) == [0, 1]
    assert all(choice.delta.content is None for choice in finals)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 6
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_is_server_sent_events_to_the_byte(server):
    body = {"model": BASE, "messages": HELLO, "stream": True, "stop": ["lo wo"]}
    answer = server.post("/v1/chat/completions", body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = answer.text.split("\n\n")
    assert all(event.startswith("data: {") for event in events[:-2])
    assert events[-2:] == ["data: [DONE]", ""]
    assert '"content":"hel"' in answer.text
    assert '"finish_reason":"stop","stop_reason":"lo wo"' in events[-3]


def test_text_parts_and_developer_messages_reach_the_template(server, client):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    client.chat.completions.create(
        model=BASE, messages=messages, extra_body={"chat_template_kwargs": {"prefill": "Yes"}}
    )
    decode = server.vocabulary.decoder(skip_special_tokens=False)
    assert decode(server.engine.submitted[0].prompt_token_ids) == (
        "<|start|>system\nbe kind<|end|>\n<|start|>user\none\ntwo<|end|>\n<|start|>assistant\nYes"
    )


def test_an_answer_can_be_sent_back_as_history(client):
    answer = client.chat.completions.create(model=BASE, messages=HELLO)
    history = [*HELLO, answer.choices[0].message, *HELLO]
    again = client.chat.completions.create(model=BASE, messages=history)
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens


def test_logprobs_have_bytes_and_alternatives(client):
    answer = client.chat.completions.create(
        model=BASE, messages=HELLO, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content] == ["hello", " world", "<|end|>"]
    assert bytes(content[1].bytes) == b" world"
    assert [top.logprob for top in content[0].top_logprobs] == [-0.5, -9999.0]
    stream = client.chat.completions.create(model=BASE, messages=HELLO, logprobs=True, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in stream]
    assert [e.token for part in parts if part for e in part.content] == [
        "hello",
        " world",
        "<|end|>",
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "name": "Al"}]}, "messages[0].name"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]},
            "messages[0].tool_calls",
        ),
        ({"messages": [{"role": "user", "content": "x", "nme": 1}]}, "messages[0].nme"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, "tools[0].function.name"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [with_parameters({"type": "string"})]}, "tools[0].function.parameters"),
        ({"tools": [with_parameters(DEEP)]}, "tools[0].function.parameters"),
        ({"chat_template_kwargs": {"prefill": DEEP}}, "chat_template_kwargs"),
        ({"tools": [with_parameters({"not": {}})], "tool_choice": "required"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": NAMED_G}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"documents": [{"text": "x"}]}, "documents"),
        ({"echo": True}, "echo"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"response_format": {"type": "json"}}, "response_format.type"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"prompt": "x"}, "prompt"),
        ({"chat_template": "x"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
    ],
)
def test_a_bad_field_is_refused_by_name(server, fields, param):
    answer = server.post("/v1/chat/completions", {"model": BASE, "messages": HELLO, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    if param is not None:
        assert error["param"] == param
    assert server.engine.submitted == []


def test_values_that_ask_for_nothing_are_accepted(client):
    client.chat.completions.create(
        model=BASE,
        messages=HELLO,
        tools=[],
        tool_choice="none",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        modalities=["text"],
        user="u",
    )
