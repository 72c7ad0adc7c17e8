"""`POST /v1/messages` with Anthropic's own client and an engine that says what we want."""

from __future__ import annotations

import asyncio

import anthropic
import pytest

from loraplex_scheduler.plan import EndEvent, FinishReason
from tests.server.api.conftest import BASE
from tests.server.api.test_tools import CALL, prompt_of, roomy, says

__all__ = ["roomy"]

HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "name": "weather",
    "description": "tells the weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


USED = {"type": "tool_use", "id": "t", "name": "weather", "input": {}}


@pytest.fixture
def claude(server):
    with anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0) as client:
        yield client


def ask(claude, **fields):
    given = {"model": BASE, "messages": HELLO, "max_tokens": 200, **fields}
    return claude.messages.create(**given)


def test_a_message_is_answered(server, claude):
    says(server, "hello world")
    answer = ask(claude, system="be kind", extra_body={"temperature": 0.5, "top_k": 3})
    assert (answer.type, answer.role, answer.stop_reason) == ("message", "assistant", "end_turn")
    assert [block.text for block in answer.content] == ["hello world"]
    [request] = server.engine.submitted
    assert (request.sampling.temperature, request.sampling.top_k) == (0.5, 3)
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (
        len(request.prompt_token_ids),
        3,
    )
    assert prompt_of(server).startswith("<|start|>system\nbe kind<|end|>\n<|start|>user\nhello")


def test_tokens_of_the_cache_are_counted_apart(server, claude):
    says(server, "hello")
    server.engine.num_cached = lambda request: 4
    usage = ask(claude).usage
    num_prompt = len(server.engine.submitted[0].prompt_token_ids)
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (num_prompt - 4, 4)
    with claude.messages.stream(model=BASE, messages=HELLO, max_tokens=9) as stream:
        streamed = stream.get_final_message().usage
    assert (streamed.input_tokens, streamed.cache_read_input_tokens) == (num_prompt - 4, 4)
    assert streamed.output_tokens == usage.output_tokens


@pytest.mark.parametrize(
    ("fields", "reason", "sequence"),
    [
        ({"max_tokens": 1}, "max_tokens", None),
        ({"stop_sequences": ["lo w"]}, "stop_sequence", "lo w"),
    ],
)
def test_how_it_ended_is_told(server, claude, fields, reason, sequence):
    says(server, "hello world")
    answer = ask(claude, **fields)
    assert (answer.stop_reason, answer.stop_sequence) == (reason, sequence)
    with claude.messages.stream(
        **{"model": BASE, "messages": HELLO, "max_tokens": 200, **fields}
    ) as stream:
        final = stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence) == (reason, sequence)
    assert [block.text for block in final.content] == [block.text for block in answer.content]


def test_a_stream_has_the_shape_of_anthropics(server, claude):
    says(server, f"Hm.{CALL}")
    events = list(ask(claude, tools=[WEATHER], stream=True))
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert [e.index for e in events if e.type == "content_block_stop"] == [0, 1]


def test_a_call_is_a_block_of_its_own(server, claude):
    says(server, f"Hm.{CALL}")
    answer = ask(claude, tools=[WEATHER])
    assert [block.type for block in answer.content] == ["text", "tool_use"]
    call = answer.content[1]
    assert (call.name, call.input, answer.stop_reason) == ("weather", {"city": "Oslo"}, "tool_use")
    with claude.messages.stream(
        model=BASE, messages=HELLO, max_tokens=200, tools=[WEATHER]
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_message()
    assert "input_json" in kinds
    assert (final.content[1].name, final.content[1].input) == (call.name, call.input)
    assert final.stop_reason == "tool_use"


def test_a_conversation_goes_on_with_calls_and_their_results(server, claude):
    says(server, CALL)
    first = ask(claude, tools=[WEATHER])
    call = first.content[0]
    says(server, "It rains.")
    results = [
        {
            "type": "tool_result",
            "tool_use_id": call.id,
            "content": [
                {"type": "text", "text": "no city", "cache_control": {"type": "ephemeral"}}
            ],
            "is_error": True,
        },
        {"type": "text", "text": "so?"},
    ]
    history = [
        *HELLO,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": results},
    ]
    answer = ask(claude, messages=history, tools=[WEATHER])
    assert answer.content[0].text == "It rains."
    prompt = prompt_of(server)
    assert f"<|start|>assistant\n{CALL}<|end|>" in prompt
    assert "<tool_response>\nError: no city\n</tool_response><|end|>\n<|start|>user\nso?" in prompt


def test_a_prefilled_answer_goes_on(server, claude):
    says(server, " world")
    history = [*HELLO, {"role": "assistant", "content": "hello"}]
    assert ask(claude, messages=history).content[0].text == " world"
    assert prompt_of(server).endswith("<|start|>assistant\nhello")


@pytest.mark.parametrize(
    ("choice", "has_grammar"),
    [
        ({"type": "auto"}, False),
        ({"type": "auto", "disable_parallel_tool_use": True}, True),
        ({"type": "any"}, True),
        ({"type": "tool", "name": "weather"}, True),
        ({"type": "none"}, False),
    ],
)
def test_what_the_choice_demands_is_a_grammar(server, claude, choice, has_grammar):
    says(server, CALL)
    ask(claude, tools=[WEATHER], tool_choice=choice)
    assert (server.engine.submitted[-1].sampling.grammar is not None) == has_grammar


def test_tokens_can_be_counted_without_an_answer(server, claude):
    says(server, "hello")
    given = {"model": BASE, "messages": HELLO, "system": "be kind", "tools": [WEATHER]}
    counted = claude.messages.count_tokens(**given).input_tokens
    assert server.engine.submitted == []
    assert claude.messages.create(**given, max_tokens=5).usage.input_tokens == counted


def test_the_asynchronous_client_works(server):
    says(server, "hello world")

    async def ask_twice():
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="x") as client:
            given = {"model": BASE, "messages": HELLO, "max_tokens": 9}
            answer = await client.messages.create(**given)
            async with client.messages.stream(**given) as stream:
                texts = [text async for text in stream.text_stream]
            return answer.content[0].text, "".join(texts)

    assert asyncio.run(ask_twice()) == ("hello world", "hello world")


def test_an_adapter_answers_by_its_name(server, claude, adapter):
    says(server, "hello")
    assert ask(claude, model=adapter).model == adapter
    assert server.engine.submitted[-1].adapter is not None


def test_errors_have_the_shape_of_anthropics(server, claude):
    with pytest.raises(anthropic.NotFoundError) as caught:
        ask(claude, model="nobody")
    body = caught.value.response.json()
    assert (body["type"], body["error"]["type"]) == ("error", "not_found_error")
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        ask(claude, max_tokens=0)
    answer = server.post("/v1/messages/count_tokens", {"model": BASE})
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_failure_in_the_stream_is_told(server, claude):
    says(server, "hello world")
    server.engine.end_with = EndEvent("", FinishReason.FAILED, "broken")
    server.engine.end_after = 1
    with pytest.raises(anthropic.APIStatusError, match="broken"):
        list(ask(claude, stream=True))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, None),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, None),
        ({"messages": [*HELLO, {"role": "assistant", "content": [USED]}]}, "messages"),
        ({"messages": [{"role": "user", "content": []}]}, None),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, None),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"thinking": {"type": "enabled"}}, "chat_template_kwargs"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.budget_tokens"),
        ({"stop": ["x"]}, "stop"),
        ({"n": 2}, "n"),
        ({"container": "c"}, "container"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(server, fields, param):
    body = {"model": BASE, "messages": HELLO, "max_tokens": 9, **fields}
    answer = server.post("/v1/messages", body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param, error
    assert server.engine.submitted == []


def test_a_model_that_cannot_be_told_to_reason_says_so(server, claude):
    with pytest.raises(anthropic.BadRequestError, match="cannot be told to reason"):
        ask(claude, extra_body={"thinking": {"type": "enabled"}})
    assert server.engine.submitted == []


def test_thinking_that_is_off_asks_for_nothing(server, claude):
    says(server, "hello")
    assert ask(claude, thinking={"type": "disabled"}).content[0].text == "hello"
