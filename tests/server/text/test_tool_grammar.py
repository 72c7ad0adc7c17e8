"""What the grammars of calls accept, judged by llguidance over a real tokenizer."""

from __future__ import annotations

import llguidance.hf
import pytest
from llguidance import LLMatcher
from tokenizers import AddedToken

from loraplex_server.text.errors import InvalidGrammar
from loraplex_server.text.tool_format import (
    GRANITE,
    HERMES,
    LLAMA3_JSON,
    MISTRAL,
    MISTRAL_NAMED,
)
from loraplex_server.text.tool_grammar import CallRules, call_grammar
from loraplex_server.text.vocabulary import Vocabulary
from tests.support.tiny_tokenizer import make_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}
F_CALL, G_CALL = '{"name": "f", "arguments": {"n": 1}}', '{"name": "g", "arguments": {}}'
WRONG = '{"name": "f", "arguments": {"m": 1}}'


@pytest.fixture(scope="module")
def tokenizer():
    """One whose marks of calls are special tokens, as those of the families that have them."""
    tokenizer = make_tokenizer()
    marks = ("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken(m, special=True) for m in marks])
    return tokenizer


@pytest.fixture(scope="module")
def accepts(tokenizer):
    """Return a function that says whether an answer is complete under a grammar."""
    vocabulary = Vocabulary(tokenizer)
    judge = llguidance.hf.from_tokenizer(tokenizer)

    def accepts(tool_format, text, **rules):
        functions = [("f", SCHEMA), ("g", {"type": "object", "properties": {}})]
        given = CallRules(**{"functions": functions, "is_forced": True, **rules})
        grammar = call_grammar(tool_format, given, vocabulary.special_token_id)
        matcher = LLMatcher(judge, grammar)
        assert not matcher.is_error(), matcher.get_error()
        token_ids = vocabulary.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()

    return accepts


def tagged(*calls):
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


def llama(call):
    return call.replace("arguments", "parameters")


@pytest.mark.parametrize(
    ("tool_format", "text"),
    [
        (HERMES, tagged(F_CALL)),
        (HERMES, tagged(F_CALL, G_CALL)),
        (LLAMA3_JSON, llama(F_CALL)),
        (MISTRAL, f"[TOOL_CALLS][{F_CALL}, {G_CALL}]"),
        (MISTRAL_NAMED, '[TOOL_CALLS]f[ARGS]{"n": 1}'),
        (MISTRAL_NAMED, '[TOOL_CALLS]f[ARGS]{"n": 1}[TOOL_CALLS]g[ARGS]{}'),
        (GRANITE, f"<|tool_call|>[{F_CALL}]"),
    ],
)
def test_a_forced_answer_is_calls_in_the_familys_own_way(accepts, tool_format, text):
    assert accepts(tool_format, text)
    assert not accepts(tool_format, text.replace('"n"', '"m"'))
    assert not accepts(tool_format, text.replace("f", "h"))
    assert not accepts(tool_format, f"Well. {text}")
    assert not accepts(tool_format, "")


@pytest.mark.parametrize(
    ("tool_format", "text"),
    [
        (HERMES, "Sure.\n{}\nDone."),
        (MISTRAL, "Sure.[TOOL_CALLS][{}]"),
        (GRANITE, "Sure.<|tool_call|>[{}]"),
        (LLAMA3_JSON, "{}"),
        (LLAMA3_JSON, "<|python_tag|>{}"),
    ],
)
def test_a_free_answer_is_text_and_calls_by_their_schemas(accepts, tool_format, text):
    is_bare = tool_format is LLAMA3_JSON
    calls = [llama(c) if is_bare else c for c in (F_CALL, WRONG)]
    if tool_format is HERMES:
        calls = [tagged(call) for call in calls]
    right, wrong = (text.replace("{}", call) for call in calls)
    assert accepts(tool_format, right, is_forced=False)
    assert not accepts(tool_format, wrong, is_forced=False)
    assert accepts(tool_format, "no call, <tool 5 [x]", is_forced=False)
    assert accepts(tool_format, "", is_forced=False)


def test_calls_can_be_limited_to_one(accepts):
    assert accepts(HERMES, tagged(F_CALL), max_calls=1)
    assert not accepts(HERMES, tagged(F_CALL, F_CALL), max_calls=1)
    assert not accepts(HERMES, tagged(F_CALL, F_CALL), max_calls=1, is_forced=False)
    assert accepts(HERMES, tagged(F_CALL), max_calls=1, is_forced=False)


def test_reasoning_that_the_prompt_began_comes_before_a_forced_call(accepts):
    text = f"so <b> it is\n</think>\n\n{tagged(F_CALL)}"
    assert accepts(HERMES, text, begins_inside_reasoning=True)
    assert not accepts(HERMES, text)


@pytest.mark.parametrize("tool_format", [HERMES, MISTRAL])
def test_a_text_may_have_a_schema_of_its_own_beside_calls(accepts, tool_format):
    rules = {"is_forced": False, "text_schema": SCHEMA}
    calls = {
        "hermes": tagged(F_CALL),
        "mistral": f"[TOOL_CALLS][{F_CALL}]",
    }
    assert accepts(tool_format, calls[tool_format.name], **rules)
    assert accepts(tool_format, '{"n": 5}', **rules)
    assert not accepts(tool_format, "five", **rules)
    assert not accepts(tool_format, '{"m": 5}', **rules)


def test_calls_without_a_mark_leave_no_room_for_another_json(accepts):
    with pytest.raises(InvalidGrammar, match="ask for either"):
        accepts(LLAMA3_JSON, "{}", is_forced=False, text_schema=SCHEMA)


def test_a_schema_that_cannot_be_enforced_is_refused():
    rules = CallRules([("f", {"type": "object", "not": {}})], is_forced=True)
    with pytest.raises(InvalidGrammar) as caught:
        call_grammar(HERMES, rules, lambda mark: None)
    assert caught.value.param == "tools"
