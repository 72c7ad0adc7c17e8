"""Tools in `/v1/chat/completions`: the real client, and an engine that says what we want."""

from __future__ import annotations

import json

import pytest

from tests.server.api.conftest import BASE, make_adapter

QUESTION = [{"role": "user", "content": "Weather in Oslo?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "tells the weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TEMPLATE_WITH_TOOLS = (
    "{% if tools %}TOOLS{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{% endfor %}"
)


def says(server, text):
    server.engine.reply = lambda request: server.vocabulary.encode(text)


def prompt_of(server, index=-1):
    decode = server.vocabulary.decoder(skip_special_tokens=False)
    return decode(server.engine.submitted[index].prompt_token_ids)


def ask(client, **fields):
    return client.chat.completions.create(model=BASE, messages=QUESTION, max_tokens=200, **fields)


@pytest.fixture(autouse=True)
def roomy(server, monkeypatch):
    """Prompts with tools in them are longer than the usual context of these tests."""
    import dataclasses

    from tests.support import fake_engine

    info = dataclasses.replace(fake_engine.INFO, max_model_len=4096)
    monkeypatch.setattr(fake_engine, "INFO", info)


def test_a_call_is_told_apart_from_the_text(server, client):
    says(server, f"Let me look.\n{CALL}")
    [choice] = ask(client, tools=[WEATHER, TIME]).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look.\n"
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    assert call.id.startswith("call_")


def test_an_answer_that_only_calls_has_no_content(server, client):
    says(server, CALL)
    assert ask(client, tools=[WEATHER]).choices[0].message.content is None


def test_a_stream_of_a_call_has_the_shape_of_openais(server, client):
    says(server, f"Hm.{CALL}{CALL}")
    chunks = list(ask(client, tools=[WEATHER], stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    begun = [call for call in calls if call.id]
    assert [(c.index, c.type, c.function.name) for c in begun] == [
        (0, "function", "weather"),
        (1, "function", "weather"),
    ]
    assert len({call.id for call in begun}) == 2
    for index in (0, 1):
        parts = [call.function.arguments for call in calls if call.index == index]
        assert len(parts) > 2, "arguments come while they are written"
        assert json.loads("".join(parts)) == {"city": "Oslo"}
    assert "".join(delta.content or "" for delta in deltas) == "Hm."
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_clients_own_accumulator_understands_the_stream(server, client):
    says(server, CALL)
    with client.chat.completions.stream(
        model=BASE, messages=QUESTION, tools=[WEATHER], max_tokens=200
    ) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        message = stream.get_final_completion().choices[0].message
    assert [json.loads(event.arguments) for event in done] == [{"city": "Oslo"}]
    assert message.tool_calls[0].function.name == "weather"


def test_a_call_cut_off_by_the_length_does_not_ask_to_be_made(server, client):
    says(server, CALL)
    num_tokens = len(server.vocabulary.encode(CALL.partition("Os")[0]))
    answer = client.chat.completions.create(
        model=BASE, messages=QUESTION, max_tokens=num_tokens, tools=[WEATHER]
    )
    assert answer.choices[0].finish_reason == "length"


def test_tools_reach_a_template_without_tools_in_the_system_prompt(server, client):
    says(server, "fine")
    ask(client, tools=[WEATHER])
    system, _, rest = prompt_of(server).partition("<|end|>")
    assert system.startswith("<|start|>system\n# Tools")
    assert json.dumps(WEATHER["function"]["parameters"]) in system
    assert "Weather in Oslo?" in rest


def test_a_conversation_with_calls_and_results_is_rendered_without_tools_in_the_template(
    server, client
):
    says(server, "fine")
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
    }
    history = [
        {"role": "system", "content": "Be brief."},
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call, {**call, "id": "c2"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "sun"}]},
    ]
    client.chat.completions.create(model=BASE, messages=history, tools=[WEATHER])
    prompt = prompt_of(server)
    assert prompt.startswith("<|start|>system\nBe brief.\n\n# Tools")
    assert f"<|start|>assistant\n{CALL}\n{CALL}<|end|>" in prompt
    assert (
        "<|start|>user\n<tool_response>\nrain\n</tool_response>\n"
        "<tool_response>\nsun\n</tool_response><|end|>" in prompt
    )


def test_an_answer_with_calls_can_be_sent_back(server, client):
    says(server, CALL)
    message = ask(client, tools=[WEATHER]).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    says(server, "It rains.")
    again = client.chat.completions.create(
        model=BASE, messages=[*QUESTION, message, result], tools=[WEATHER]
    )
    assert again.choices[0].message.content == "It rains."
    assert again.choices[0].finish_reason == "stop"


def test_an_adapters_own_template_decides_the_format(server, client, tmp_path):
    server.upload("tools", make_adapter(tmp_path / "tools"))
    defaults = {"chat_template": TEMPLATE_WITH_TOOLS}
    with server.http() as http:
        answer = http.patch("/v1/adapters/tools", json={"defaults": defaults})
    assert answer.status_code == 200, answer.text
    says(server, CALL)
    answer = client.chat.completions.create(model="tools", messages=QUESTION, tools=[WEATHER])
    assert answer.choices[0].finish_reason == "tool_calls"
    assert prompt_of(server).startswith('TOOLS[{"type": "function"')


def test_without_tools_the_text_is_the_models_own(server, client):
    says(server, CALL)
    assert ask(client).choices[0].message.content == CALL
    answer = ask(client, tools=[WEATHER], tool_choice="none")
    assert answer.choices[0].message.content == CALL
    assert "# Tools" not in prompt_of(server)


@pytest.mark.parametrize(
    ("fields", "has_grammar"),
    [
        ({}, False),
        ({"tool_choice": "auto"}, False),
        ({"tool_choice": "required"}, True),
        ({"tool_choice": {"type": "function", "function": {"name": "time"}}}, True),
        ({"parallel_tool_calls": False}, True),
    ],
)
def test_what_the_choice_demands_is_a_grammar(server, client, fields, has_grammar):
    says(server, CALL)
    ask(client, tools=[WEATHER, TIME], **fields)
    grammar = server.engine.submitted[-1].sampling.grammar
    assert (grammar is not None) == has_grammar
    if isinstance(fields.get("tool_choice"), dict):
        assert "time" in grammar
        assert "weather" not in grammar


def test_allowed_tools_are_the_only_ones_shown(server, client):
    says(server, CALL)
    allowed = [{"type": "function", "function": {"name": "time"}}]
    choice = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": allowed},
    }
    answer = ask(client, tools=[WEATHER, TIME], tool_choice=choice)
    assert answer.choices[0].message.content == CALL
    assert '"weather"' not in prompt_of(server)


def test_logprobs_belong_to_all_tokens_of_a_call(server, client):
    says(server, CALL)
    whole = ask(client, tools=[WEATHER], logprobs=True).choices[0].logprobs.content
    chunks = ask(client, tools=[WEATHER], logprobs=True, stream=True)
    parts = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    streamed = [entry.token for part in parts for entry in part]
    assert streamed == [entry.token for entry in whole]
    assert "".join(streamed).startswith(CALL)


def test_every_sample_has_its_own_calls(server, client):
    says(server, CALL)
    answer = ask(client, tools=[WEATHER], n=2)
    ids = [choice.message.tool_calls[0].id for choice in answer.choices]
    assert len(set(ids)) == 2


def test_a_stop_string_ends_a_call_too(server, client):
    says(server, f"{CALL} and more")
    answer = ask(client, tools=[WEATHER], stop=["</tool_call>"])
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.tool_calls[0].function.arguments == '{"city": "Oslo"}'
