"""`POST /v1/responses` with the real client and an engine that says what we want."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest
from openai.types.responses import Response

from loraplex_scheduler.plan import EndEvent, FinishReason
from tests.server.api.conftest import BASE
from tests.server.api.test_tools import CALL, prompt_of, roomy, says

__all__ = ["roomy"]

WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}


def said(part):
    return {"role": "user", "content": part if isinstance(part, str) else [part]}


def test_a_text_is_answered(server, client):
    says(server, "hello world")
    answer = client.responses.create(
        model=BASE,
        input="hello",
        instructions="be kind",
        max_output_tokens=50,
        temperature=0.5,
        metadata={"a": "b"},
    )
    assert (answer.output_text, answer.status, answer.object) == (
        "hello world",
        "completed",
        "response",
    )
    assert answer.output[0].id.startswith("msg_")
    assert (answer.temperature, answer.metadata, answer.instructions) == (
        0.5,
        {"a": "b"},
        "be kind",
    )
    [request] = server.engine.submitted
    assert request.sampling.max_tokens == 50
    assert answer.usage.input_tokens == len(request.prompt_token_ids)
    assert answer.usage.output_tokens == 3
    assert prompt_of(server) == (
        "<|start|>system\nbe kind<|end|>\n<|start|>user\nhello<|end|>\n<|start|>assistant\n"
    )


def test_an_answer_at_its_length_is_incomplete(server, client):
    says(server, "hello world")
    answer = client.responses.create(model=BASE, input="hello", max_output_tokens=1)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.output[0].status == "incomplete"


EVENTS_OF_A_TEXT = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


def test_a_stream_tells_everything_in_order(server, client):
    says(server, "hello world")
    events = list(client.responses.create(model=BASE, input="hello", stream=True))
    kinds = [event.type for event in events]
    assert list(dict.fromkeys(kinds)) == EVENTS_OF_A_TEXT
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == "hello world"
    whole = client.responses.create(model=BASE, input="hello")
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage == whole.usage


def test_a_call_is_an_item_of_its_own(server, client):
    says(server, f"Hm.{CALL}")
    answer = client.responses.create(model=BASE, input="Weather?", tools=[WEATHER])
    assert [item.type for item in answer.output] == ["message", "function_call"]
    call = answer.output[1]
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Oslo"})
    events = list(
        client.responses.create(model=BASE, input="Weather?", tools=[WEATHER], stream=True)
    )
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    [done] = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert len(deltas) > 2
    assert "".join(deltas) == done.arguments == call.arguments
    assert [item.type for item in events[-1].response.output] == ["message", "function_call"]
    assert all(isinstance(e.response, Response) for e in (events[0], events[-1]))


def test_the_helper_for_streams_accepts_every_event(server, client):
    says(server, CALL)
    with client.responses.stream(model=BASE, input="Weather?", tools=[WEATHER]) as stream:
        for _ in stream:
            pass
        response = stream.get_final_response()
    assert response.output[0].name == "weather"


def test_a_conversation_goes_on_with_calls_and_their_results(server, client):
    says(server, CALL)
    first = client.responses.create(model=BASE, input="Weather?", tools=[WEATHER])
    call = first.output[0]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    says(server, "It rains.")
    history = [{"role": "user", "content": "Weather?"}, *first.output, result]
    answer = client.responses.create(model=BASE, input=history, tools=[WEATHER])
    assert answer.output_text == "It rains."
    prompt = prompt_of(server)
    assert f"<|start|>assistant\n{CALL}<|end|>" in prompt
    assert "<tool_response>\nrain\n</tool_response>" in prompt


def test_text_parts_and_reasoning_of_a_turn_become_one_message(server, client):
    says(server, "hello")
    history = [
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": []},
        {
            "type": "message",
            "role": "assistant",
            "id": "msg_1",
            "status": "completed",
            "content": [{"type": "output_text", "text": "hi", "annotations": []}],
        },
        {"role": "developer", "content": "be kind"},
    ]
    client.responses.create(model=BASE, input=history)
    assert prompt_of(server) == (
        "<|start|>user\nhello<|end|>\n<|start|>assistant\nhi<|end|>\n"
        "<|start|>system\nbe kind<|end|>\n<|start|>assistant\n"
    )


def test_logprobs_come_with_the_text(server, client):
    says(server, "hello world")
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    answer = client.responses.create(model=BASE, input="hello", **fields)
    shown = answer.output[0].content[0].logprobs
    assert [entry.token for entry in shown] == ["hello", " world", "<|end|>"]
    assert len(shown[0].top_logprobs) == 2
    events = list(client.responses.create(model=BASE, input="hello", stream=True, **fields))
    [done] = [e for e in events if e.type == "response.output_text.done"]
    assert [entry.token for entry in done.logprobs] == ["hello", " world", "<|end|>"]


def test_the_asynchronous_client_works(server):
    says(server, "hello world")

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            answer = await client.responses.create(model=BASE, input="hello")
            stream = await client.responses.create(model=BASE, input="hello", stream=True)
            return answer.output_text, [event.type async for event in stream][-1]

    assert asyncio.run(ask()) == ("hello world", "response.completed")


def test_an_adapter_answers_by_its_name(server, client, adapter):
    says(server, "hello")
    answer = client.responses.create(model=adapter, input="hello")
    assert answer.model == adapter
    assert server.engine.submitted[-1].adapter is not None


def test_a_failure_in_the_stream_is_told(server, client):
    says(server, "hello world")
    server.engine.end_with = EndEvent("", FinishReason.FAILED, "broken")
    server.engine.end_after = 1
    events = list(client.responses.create(model=BASE, input="hello", stream=True))
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]
    assert events[-1].response.error.message == events[-2].message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"store": True}, "store"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"reasoning": {"effort": "low"}}, "reasoning_effort"),
        ({"input": [{"type": "computer_call_output"}]}, "input[0].type"),
        ({"input": [said({"type": "input_image"})]}, "input[0].content[0].type"),
        ({"input": [said({"type": "text"})]}, "input[0].content[0].text"),
        ({"input": [said("x") | {"nme": 1}]}, "input[0].nme"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"surprise": 1}, "surprise"),
        ({"temperature": -1.0}, "temperature"),
        ({"text": {"format": {"type": "json_schema"}}}, None),
        ({"include": ["web_search_call.results"]}, None),
    ],
)
def test_what_is_not_supported_is_refused_by_name(server, fields, param):
    answer = server.post("/v1/responses", {"model": BASE, "input": "hello", **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    if param is not None:
        assert error["param"] == param, error
    assert server.engine.submitted == []


def test_no_memory_is_explained(server):
    body = {"model": BASE, "input": "x", "previous_response_id": "resp_1"}
    error = server.post("/v1/responses", body).json()["error"]
    assert "keeps no responses" in error["message"]


def test_what_json_cannot_write_is_refused_before_it_would_be_echoed(server):
    parameters = {"type": "object", "default": float("nan")}
    tool = {"type": "function", "name": "f", "parameters": parameters}
    body = json.dumps({"model": BASE, "input": "x", "tools": [tool]})
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/responses", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tools[0].parameters"
