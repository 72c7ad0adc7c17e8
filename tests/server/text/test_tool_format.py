from __future__ import annotations

import pytest

from loraplex_server.text.chat_template import ChatTemplate
from loraplex_server.text.errors import ChatTemplateMissing
from loraplex_server.text.tool_format import (
    GRANITE,
    HERMES,
    LLAMA3_JSON,
    MISTRAL,
    MISTRAL_NAMED,
    choose_tool_format,
)
from loraplex_server.text.vocabulary import Vocabulary
from tests.support.tiny_tokenizer import make_tokenizer

PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
QWEN = "{% if tools %}For each function call: <tool_call>{% endif %}"
QWEN_CODER = "{% if tools %}<tool_call>\n<function=example>{% endif %}"
LLAMA = '{% if tools %}{{ \'{"name": "\' }}"parameters": ipython <|python_tag|>{% endif %}'
MIXTRAL = "{% if tools %}[AVAILABLE_TOOLS]{{ tools }}{% endif %}[TOOL_CALLS] ["
DEVSTRAL = "{% if tools %}x{% endif %}[TOOL_CALLS]{{ name }}[ARGS]"
GRANITE_3 = "{% if tools %}respond with <|tool_call|> followed by a JSON list{% endif %}"
UNKNOWN = "{% if tools %}<function_calls>{{ tools }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PLAIN, HERMES),
        (QWEN, HERMES),
        (QWEN_CODER, None),
        (LLAMA, LLAMA3_JSON),
        (MIXTRAL, MISTRAL),
        (DEVSTRAL, MISTRAL_NAMED),
        (GRANITE_3, GRANITE),
        (UNKNOWN, None),
    ],
)
def test_a_template_tells_its_family(template, expected):
    assert choose_tool_format(ChatTemplate(template), "auto") is expected


def test_the_setting_decides_before_the_template():
    assert choose_tool_format(ChatTemplate(UNKNOWN), "hermes") is HERMES
    assert choose_tool_format(ChatTemplate(QWEN), "none") is None
    assert choose_tool_format(ChatTemplate(DEVSTRAL), "mistral") is MISTRAL_NAMED


def test_a_template_knows_its_variables_but_not_words_of_its_text():
    template = ChatTemplate("You have tools. {# documents #}{% if effort %}{{ m['x'] }}{% endif %}")
    assert template.knows("effort")
    assert not template.knows("tools")
    assert not template.knows("documents")
    assert not ChatTemplate("{% if %}{{").knows("tools")


def test_a_tokenizer_may_have_a_template_for_tools_alone():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": PLAIN, "tool_use": QWEN}
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.chat_template().text == PLAIN
    assert vocabulary.chat_template(with_tools=True).text == QWEN
    assert vocabulary.chat_template("own", with_tools=True).text == "own"
    tokenizer.chat_template = None
    with pytest.raises(ChatTemplateMissing):
        vocabulary.chat_template()


def test_only_special_tokens_are_marks():
    vocabulary = Vocabulary(make_tokenizer())
    assert vocabulary.special_token_id("<|start|>") == 1
    assert vocabulary.special_token_id("hello") is None
    assert vocabulary.special_token_id("<tool_call>") is None
