"""Calls of tools by the real model, through every endpoint that takes conversations."""

from __future__ import annotations

import json

import pydantic
import pytest

pytestmark = pytest.mark.model

BASE = "SmolLM2-135M-Instruct"
QUESTION = [{"role": "user", "content": "What is the weather in Oslo, in celsius?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
ABOUT = "tells the weather in a city"


def check(arguments):
    assert set(arguments) == {"city", "unit"}
    assert len(arguments["city"]) <= 20
    assert arguments["unit"] in ("celsius", "fahrenheit")


def chat_tool(**more):
    function = {"name": "weather", "description": ABOUT, "parameters": SCHEMA, **more}
    return {"type": "function", "function": function}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_forced_call_in_chat_follows_its_schema(client, choice):
    given = {"model": BASE, "messages": QUESTION, "tools": [chat_tool()], "tool_choice": choice}
    fields = {"parallel_tool_calls": False, "max_tokens": 150, "temperature": 1.0, "seed": 1}
    [answer] = client.chat.completions.create(**given, **fields).choices
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    [call] = answer.message.tool_calls
    check(json.loads(call.function.arguments))
    chunks = list(client.chat.completions.create(**given, **fields, stream=True))
    calls = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]
    assert "".join(c.function.arguments for c in calls) == call.function.arguments


def test_a_strict_function_is_free_to_be_called_or_not(client):
    answer = client.chat.completions.create(
        model=BASE,
        messages=QUESTION,
        tools=[chat_tool(strict=True)],
        max_tokens=60,
        temperature=0.0,
    )
    [choice] = answer.choices
    for call in choice.message.tool_calls or ():
        if choice.finish_reason != "length":
            check(json.loads(call.function.arguments))
    assert choice.message.content or choice.message.tool_calls


def test_a_forced_call_in_responses_follows_its_schema(client):
    tool = {"type": "function", "name": "weather", "description": ABOUT, "parameters": SCHEMA}
    answer = client.responses.create(
        model=BASE,
        input=QUESTION,
        tools=[{**tool, "strict": True}],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=150,
    )
    [call] = answer.output
    assert (call.type, answer.status) == ("function_call", "completed")
    check(json.loads(call.arguments))


class Weather(pydantic.BaseModel):
    city: str = pydantic.Field(max_length=20)
    is_cold: bool


def test_a_typed_answer_is_parsed_from_responses_and_chat(client):
    answer = client.responses.parse(
        model=BASE, input=QUESTION, text_format=Weather, max_output_tokens=100
    )
    assert isinstance(answer.output_parsed, Weather)
    parsed = client.chat.completions.parse(
        model=BASE, messages=QUESTION, response_format=Weather, max_tokens=100
    )
    assert isinstance(parsed.choices[0].message.parsed, Weather)


def test_a_forced_call_in_messages_follows_its_schema(claude):
    tool = {"name": "weather", "description": ABOUT, "input_schema": SCHEMA}
    answer = claude.messages.create(
        model=BASE,
        messages=QUESTION,
        max_tokens=150,
        tools=[tool],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    )
    [call] = answer.content
    assert (call.type, answer.stop_reason) == ("tool_use", "tool_use")
    check(call.input)
