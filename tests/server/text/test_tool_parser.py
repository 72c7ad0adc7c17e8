from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_server.text.tool_format import (
    GRANITE,
    HERMES,
    LLAMA3_JSON,
    MISTRAL,
    MISTRAL_NAMED,
    ToolFormat,
)
from loraplex_server.text.tool_parser import ToolParser
from loraplex_server.text.tool_pieces import AnswerParts, CallArguments, CallStart

NAMES = ("weather", "search_web")
WEATHER = '{"name": "weather", "arguments": {"city": "Oslo"}}'
SEARCH = '{"name": "search_web", "arguments": {"q": "a } \\" ] {", "n": [1, {}]}}'
WEATHER_ARGS, SEARCH_ARGS = '{"city": "Oslo"}', '{"q": "a } \\" ] {", "n": [1, {}]}'


def parse(tool_format: ToolFormat, parts, **kwargs) -> tuple[str, list[tuple[str, str]]]:
    ids = itertools.count()
    parser = ToolParser(tool_format.syntax, NAMES, lambda: f"id{next(ids)}", **kwargs)
    answer = AnswerParts()
    for part in parts:
        answer.add(parser.push(part))
    answer.add(parser.flush())
    return answer.content, [(call.name, call.arguments) for call in answer.calls]


CASES = [
    (HERMES, f"<tool_call>\n{WEATHER}\n</tool_call>", "", [("weather", WEATHER_ARGS)]),
    (
        HERMES,
        f"Let me see.\n<tool_call>\n{WEATHER}\n</tool_call>\n<tool_call>{SEARCH}</tool_call>\n",
        "Let me see.\n",
        [("weather", WEATHER_ARGS), ("search_web", SEARCH_ARGS)],
    ),
    (
        HERMES,
        f"<tool_call>{WEATHER}</tool_call> and then",
        "and then",
        [("weather", WEATHER_ARGS)],
    ),
    (HERMES, "a <tool_call> is a mark", "a <tool_call> is a mark", []),
    (HERMES, "1 <tool_cal 2", "1 <tool_cal 2", []),
    (
        HERMES,
        '<tool_call>{"name": "delete_all", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "delete_all", "arguments": {}}</tool_call>',
        [],
    ),
    (HERMES, "<tool_call>{oops}</tool_call>", "<tool_call>{oops}</tool_call>", []),
    (HERMES, '<tool_call>\n{"name": "wea', '<tool_call>\n{"name": "wea', []),
    (
        HERMES,
        '<tool_call>{"arguments": {"city": "Rome"}, "name": "weather"}</tool_call>',
        "",
        [("weather", '{"city": "Rome"}')],
    ),
    (
        HERMES,
        '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}</tool_call>',
        "",
        [("weather", '{"city": "Rome"}')],
    ),
    (
        HERMES,
        '<tool_call>{"name": "weather", "arguments": {"city": "Os',
        "",
        [("weather", '{"city": "Os')],
    ),
    (HERMES, f"<tool_call>{WEATHER}</tool", "", [("weather", WEATHER_ARGS)]),
    (HERMES, f"<tool_call>{WEATHER}", "", [("weather", WEATHER_ARGS)]),
    (HERMES, "  hello\n", "  hello\n", []),
    (HERMES, " \n", " \n", []),
    (
        LLAMA3_JSON,
        '{"name": "weather", "parameters": {"city": "Oslo"}}',
        "",
        [("weather", WEATHER_ARGS)],
    ),
    (
        LLAMA3_JSON,
        '<|python_tag|>{"type": "function", "name": "weather", "parameters": {"city": "Oslo"}}',
        "",
        [("weather", WEATHER_ARGS)],
    ),
    (
        LLAMA3_JSON,
        f"{WEATHER}; {SEARCH}",
        "",
        [("weather", WEATHER_ARGS), ("search_web", SEARCH_ARGS)],
    ),
    (LLAMA3_JSON, '{"name": "Bob", "age": 5} ok', '{"name": "Bob", "age": 5} ok', []),
    (LLAMA3_JSON, 'As JSON: {"a": 1}', 'As JSON: {"a": 1}', []),
    (LLAMA3_JSON, "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    (
        MISTRAL,
        f"[TOOL_CALLS] [{WEATHER}, {SEARCH}]",
        "",
        [("weather", WEATHER_ARGS), ("search_web", SEARCH_ARGS)],
    ),
    (
        MISTRAL,
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}, "id": "abcdefghi"}]',
        "",
        [("weather", WEATHER_ARGS)],
    ),
    (MISTRAL, "see [TOOL_CALLS] nothing", "see [TOOL_CALLS] nothing", []),
    (
        MISTRAL_NAMED,
        f"Sure.[TOOL_CALLS]weather[ARGS]{WEATHER_ARGS}[TOOL_CALLS]search_web{SEARCH_ARGS}",
        "Sure.",
        [("weather", WEATHER_ARGS), ("search_web", SEARCH_ARGS)],
    ),
    (
        MISTRAL_NAMED,
        f"[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{WEATHER_ARGS}",
        "",
        [("weather", WEATHER_ARGS)],
    ),
    (MISTRAL_NAMED, "[TOOL_CALLS]nobody[ARGS]{}", "[TOOL_CALLS]nobody[ARGS]{}", []),
    (GRANITE, f"<|tool_call|>[{WEATHER}]", "", [("weather", WEATHER_ARGS)]),
]


@pytest.mark.parametrize(("tool_format", "text", "content", "calls"), CASES)
def test_calls_and_content_are_told_apart_wherever_the_text_is_cut(
    tool_format, text, content, calls
):
    assert parse(tool_format, [text]) == (content, calls)
    assert parse(tool_format, list(text)) == (content, calls)
    for cut in range(1, len(text)):
        assert parse(tool_format, [text[:cut], text[cut:]]) == (content, calls)


_BITS = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "<tool",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<|python_tag|>",
        "<|tool_call|>",
        WEATHER,
        SEARCH,
        '{"name": "weather", "parameters": {',
        WEATHER_ARGS,
        "weather",
        "{",
        "}",
        "[",
        "]",
        ";",
        '"',
        "\\",
        "\n",
        " ",
        "hi",
        "x" * 300,
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    tool_format=st.sampled_from([HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_NAMED, GRANITE]),
    bits=st.lists(_BITS, max_size=8),
    data=st.data(),
)
def test_any_text_gives_the_same_calls_however_it_is_cut(tool_format, bits, data):
    text = "".join(bits)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    edges = [0, *cuts, len(text)]
    parts = [text[start:end] for start, end in itertools.pairwise(edges)]
    assert parse(tool_format, parts) == parse(tool_format, [text])


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="ab <>tool_callTOOL[]{}/|", max_size=60))
def test_an_answer_without_a_call_loses_nothing(text):
    for tool_format in (HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_NAMED, GRANITE):
        content, calls = parse(tool_format, list(text))
        assert (content, calls) == (text, [])


def test_arguments_are_handed_on_while_they_are_written():
    parser = ToolParser(HERMES.syntax, NAMES, lambda: "id0")
    assert parser.push('<tool_call>{"name": "weather", "argum') == []
    assert parser.push('ents": {"ci') == [CallStart("id0", "weather"), CallArguments('{"ci')]
    assert parser.push('ty": 1}') == [CallArguments('ty": 1}')]
    assert parser.push("}</tool_call>") == []
    assert parser.flush() == []


def test_calls_beyond_the_bound_are_content():
    text = f"<tool_call>{WEATHER}</tool_call><tool_call>{SEARCH}</tool_call>"
    content, calls = parse(HERMES, [text], max_calls=1)
    assert calls == [("weather", WEATHER_ARGS)]
    assert content == f"<tool_call>{SEARCH}</tool_call>"


def test_mistrals_ids_are_as_its_templates_want_them():
    assert len(MISTRAL.new_call_id()) == 9
    assert MISTRAL.new_call_id().isalnum()
    assert HERMES.new_call_id().startswith("call_")


def test_the_cases_hold_valid_json():
    assert json.loads(SEARCH)["arguments"] == json.loads(SEARCH_ARGS)
