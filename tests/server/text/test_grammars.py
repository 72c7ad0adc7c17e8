from __future__ import annotations

import pytest
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer

from loraplex_server.text import grammars
from loraplex_server.text.errors import InvalidGrammar
from tests.support.tiny_tokenizer import make_tokenizer

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 1}, "name": {"enum": ["a", "ä"]}},
    "required": ["x"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def takes():
    """Whether a grammar allows a text, and allows it to end there."""
    tokenizer = make_tokenizer()
    table = from_tokenizer(tokenizer)

    def takes(grammar: str, text: str) -> bool:
        matcher = LLMatcher(table, grammar)
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()

    return takes


def test_a_schema_allows_its_own_texts_and_no_others(takes):
    grammar = grammars.json_schema(POINT)
    assert takes(grammar, '{"x": 3, "name": "ä"}')
    assert takes(grammar, '{\n  "x": 3\n}')
    assert not takes(grammar, '{"x": 0}')
    assert not takes(grammar, '{"name": "a"}')
    assert not takes(grammar, '{"x": 3')


def test_space_inside_json_has_an_end(takes):
    grammar = grammars.json_object()
    assert takes(grammar, '{"a": [1, {"b": null}]}')
    assert not takes(grammar, "[1]")
    assert not takes(grammar, "{" + " " * 40 + "}")


def test_a_pattern_matches_the_whole_text(takes):
    grammar = grammars.regex(r"[a-c]/\d{2}")
    assert takes(grammar, "b/17")
    assert not takes(grammar, "b/1")
    assert not takes(grammar, "xb/17")


def test_choices_stand_as_they_are(takes):
    options = ["yes", 'a "b"\n\\', "😀", "(x|y)"]
    grammar = grammars.choice(options)
    assert all(takes(grammar, option) for option in options)
    assert not takes(grammar, "x")


def test_lark_may_embed_a_schema_and_gbnf_is_translated(takes):
    block = grammars.json_block(POINT)
    grammar = grammars.lark(f'start: "call " args\nargs: %json {block}\n')
    assert takes(grammar, 'call {"x": 3}')
    assert not takes(grammar, 'call {"y": 3}')
    assert takes(grammars.lark('root ::= "a" [0-9]+\n'), "a17")


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": {"type": "string"}}, "`not`"),
        ({"properties": {"a": {"type": "string", "nullable": True}}}, "#/properties/a: `nullable`"),
        ({"items": {"uniqueItems": True}}, "`uniqueItems`"),
        ({"anyOf": [{"type": "string"}, {"spelt": 1}]}, "#/anyOf/1: `spelt`"),
        ({"x-guidance": {"lenient": True}}, "`x-guidance`"),
        ({"type": "strin"}, "strin"),
        ({"type": "string", "format": "colour"}, "colour"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "#/$defs/none"}, "none"),
        ({"$ref": "https://example.com/schema"}, "https://example.com/schema"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "Unsatisfiable"),
        ({"properties": []}, "`properties` has the wrong type"),
        ({"items": "string"}, "#/items: not an object"),
        ({"const": float("nan")}, "not JSON"),
        ({"description": "x" * 70_000}, "65536 is the most"),
    ],
)
def test_what_a_schema_cannot_enforce_is_refused_by_name(schema, named):
    with pytest.raises(InvalidGrammar, match=r".") as refused:
        grammars.json_schema(schema, param="response_format")
    assert named in str(refused.value)
    assert refused.value.param == "response_format"


def test_words_about_a_schema_are_no_constraint():
    grammars.json_schema({**POINT, "title": "t", "description": "d", "default": {}, "x-order": 1})


def nested(num_levels: int) -> dict[str, object]:
    return {"items": nested(num_levels - 1)} if num_levels else {}


def referring(num_defs: int) -> dict[str, object]:
    refs = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(num_defs)}
    return {"$defs": {**refs, f"d{num_defs}": {}}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize("schema", [nested(60), referring(900)])
def test_a_schema_that_would_overflow_the_compilers_stack_is_refused(schema):
    with pytest.raises(InvalidGrammar, match="levels"):
        grammars.json_schema(schema)
    block = grammars.json.dumps(schema)
    with pytest.raises(InvalidGrammar, match="levels"):
        grammars.lark(f"start: %json {block}")


def test_a_schema_of_a_hundred_definitions_is_served():
    grammars.json_schema(referring(100))


@pytest.mark.parametrize("pattern", ["(", "(?=a)b", r"(a)\1", "a" * 9_000, "\ud800"])
def test_a_pattern_that_cannot_be_matched_is_refused(pattern):
    with pytest.raises(InvalidGrammar, match="pattern"):
        grammars.regex(pattern)


@pytest.mark.parametrize("options", [[], ["x"] * 2_000, [3], ["x" * 70_000]])
def test_choices_that_are_none_are_refused(options):
    with pytest.raises(InvalidGrammar, match="choice"):
        grammars.choice(options)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("start: nothing", "nothing"),
        ("start: %json [1]", "%json"),
        ('start: %json {"not": {}}', "`not`"),
        ("root ::= (", "GBNF"),
        ("start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(3_000)), "lines"),
    ],
)
def test_a_grammar_that_is_none_is_refused(text, named):
    with pytest.raises(InvalidGrammar) as refused:
        grammars.lark(text)
    assert named in str(refused.value)
