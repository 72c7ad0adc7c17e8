"""What an answer must look like: every way of saying it becomes one grammar, or is refused."""

from __future__ import annotations

import pydantic
import pytest

from loraplex_server.api import answer_grammar
from loraplex_server.text import grammars
from tests.server.api.conftest import BASE

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
SCHEMA_TEXT = '{"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}'


def complete(server, **fields):
    return server.post("/v1/completions", {"model": BASE, "prompt": "hello", **fields})


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "json_object"}}, grammars.json_object()),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "person", "schema": SCHEMA, "strict": True},
                }
            },
            grammars.json_schema(SCHEMA),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, grammars.json_schema(SCHEMA)),
        ({"structured_outputs": {"json": SCHEMA_TEXT}}, grammars.json_schema(SCHEMA)),
        ({"structured_outputs": {"regex": "a+"}}, grammars.regex("a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, grammars.choice(["a", "b"])),
        ({"structured_outputs": {"grammar": 'start: "x"'}}, grammars.lark('start: "x"')),
        ({"structured_outputs": {"json_object": True}}, grammars.json_object()),
        ({"guided_json": SCHEMA}, grammars.json_schema(SCHEMA)),
        ({"guided_regex": "a+"}, grammars.regex("a+")),
        ({"guided_choice": ["a", "b"]}, grammars.choice(["a", "b"])),
        ({"guided_grammar": 'start: "x"'}, grammars.lark('start: "x"')),
    ],
)
def test_every_way_of_saying_it_reaches_the_engine_as_a_grammar(server, fields, grammar):
    assert complete(server, **fields).is_success
    assert server.engine.submitted[0].sampling.grammar == grammar


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"structured_outputs": {}},
        {"structured_outputs": {"json_object": False, "disable_fallback": True}},
        {"guided_json": None},
    ],
)
def test_what_asks_for_nothing_constrains_nothing(server, fields):
    assert complete(server, **fields).is_success
    assert server.engine.submitted[0].sampling.grammar is None


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        (
            {"response_format": {"type": "json_object"}, "guided_regex": "a"},
            "guided_regex",
            "invalid_request",
        ),
        (
            {"structured_outputs": {"json": SCHEMA, "regex": "a"}},
            "structured_outputs.regex",
            "invalid_request",
        ),
        (
            {"structured_outputs": {"structural_tag": "x"}},
            "structured_outputs.structural_tag",
            "invalid_request",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "invalid_request",
        ),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json", "invalid_request"),
        ({"guided_json": [SCHEMA]}, "guided_json", "invalid_request"),
        ({"guided_json": ""}, "guided_json", "invalid_request"),
        ({"guided_choice": []}, "guided_choice", "invalid_request"),
        ({"guided_regex": "("}, "guided_regex", "invalid_grammar"),
        ({"guided_json": "{"}, "guided_json", "invalid_grammar"),
        ({"guided_json": "[1]"}, "guided_json", "invalid_grammar"),
        ({"structured_outputs": {"grammar": "%"}}, "structured_outputs.grammar", "invalid_grammar"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "nothing"}},
                }
            },
            "response_format",
            "invalid_grammar",
        ),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(server, fields, param, code):
    answer = complete(server, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)
    assert server.engine.submitted == []


def test_a_grammar_that_takes_too_long_to_check_is_given_up(server, monkeypatch):
    def never(shape):
        while True:
            pass

    monkeypatch.setattr(answer_grammar, "_CHECK_S", 0.2)
    monkeypatch.setattr(answer_grammar, "_write", never)
    answer = complete(server, guided_regex="a")
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_grammar"


def test_the_openai_client_parses_into_a_model(server, client):
    class Person(pydantic.BaseModel):
        age: int

    server.engine.reply = lambda request: server.vocabulary.encode('{"age": 7}')
    answer = client.chat.completions.parse(
        model=BASE, messages=[{"role": "user", "content": "hello"}], response_format=Person
    )
    assert answer.choices[0].message.parsed == Person(age=7)
    assert server.engine.submitted[0].sampling.grammar is not None
