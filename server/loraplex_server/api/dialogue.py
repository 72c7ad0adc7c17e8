"""One conversation on its way to the model and back: the prompt, and how its answers are read.

All endpoints that take conversations translate their bodies to a `ChatBody`, and come by here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from loraplex_server.api.answer_shape import ShapeFields, ShapeKind
from loraplex_server.api.chat_messages import messages_for_template
from loraplex_server.api.chat_schemas import ChatBody
from loraplex_server.api.errors import InvalidRequest
from loraplex_server.api.front import Demands, Wish
from loraplex_server.api.prompts import PromptEncoder
from loraplex_server.api.tool_schemas import NamedTool, Tool, argument_schema
from loraplex_server.text.answer_reader import AnswerReader
from loraplex_server.text.chat_template import ChatTemplate
from loraplex_server.text.reasoning import OPENING, ReasoningSplitter
from loraplex_server.text.tool_format import ToolFormat, choose_tool_format
from loraplex_server.text.tool_grammar import CallRules, call_grammar
from loraplex_server.text.tool_parser import ToolParser
from loraplex_server.text.tool_prompt import with_tools_in_text
from loraplex_server.text.vocabulary import RenderOptions, Vocabulary


class Dialogue:
    """Made for one request. Which family's format holds is known once the prompt was encoded, as
    an adapter may bring a chat template of its own."""

    def __init__(
        self, body: ChatBody, vocabulary: Vocabulary, *, tool_parser: str, trusts_templates: bool
    ) -> None:
        """Prepare the conversation of `body`.

        Args:
            tool_parser: the setting, see `choose_tool_format`.
            trusts_templates: requests may bring a chat template.

        Raises:
            InvalidRequest: the settings forbid what the body asks for.
        """
        if body.chat_template is not None and not trusts_templates:
            raise InvalidRequest(
                "`chat_template`: a template is a program, and this server runs none of its "
                "clients' (setting trust_request_chat_template); register an adapter with it",
                param="chat_template",
            )
        self._body = body
        self._vocabulary = vocabulary
        self._setting = tool_parser
        self._tools = _callable_tools(body)
        self._messages = messages_for_template(body.messages)
        self._text_schema = _text_schema(body) if self._tools and not body.must_call else None
        self._format: ToolFormat | None = None
        self._has_reasoning = self._begins_inside = False
        self._demands = Demands()

    @property
    def body(self) -> ChatBody:
        """The body to be answered: without the shape of a text that the calls' grammar has."""
        if self._text_schema is None:
            return self._body
        return self._body.model_copy(update=dict.fromkeys(ShapeFields.model_fields))

    def wish(self) -> Wish:
        """Return what the engine is asked for."""
        body = self._body
        max_tokens = body.max_completion_tokens
        return Wish(
            num_prompts=1,
            num_chars=self._num_chars(),
            encode=self._encode,
            max_tokens=body.max_tokens if max_tokens is None else max_tokens,
            default_tokens=None,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            is_chat=True,
            param="messages",
            runs_own_template=body.chat_template is not None,
            demands=lambda: self._demands,
        )

    def reader(self) -> AnswerReader | None:
        """Return what reads the next sequence's text; None where all of it is content."""
        splitter = parser = None
        if self._has_reasoning:
            splitter = ReasoningSplitter(begins_inside=self._begins_inside)
        if self._format is not None and self._tools:
            names = frozenset(tool.function.name for tool in self._tools)
            parser = ToolParser(
                self._format.syntax, names, self._format.new_call_id, max_calls=self._max_calls
            )
        if splitter is None and parser is None:
            return None
        return AnswerReader(splitter, parser, drops_reasoning=self._body.include_reasoning is False)

    @property
    def prefix(self) -> str:
        """What `echo` puts in front of the answer."""
        return self._body.messages[-1].text if self._body.echo else ""

    @property
    def _max_calls(self) -> int | None:
        is_single = self._body.parallel_tool_calls is False
        return 1 if is_single or isinstance(self._body.tool_choice, NamedTool) else None

    def _num_chars(self) -> int:
        shown = [message["content"] for message in self._messages]
        extras = [tool.for_template() for tool in self._tools], self._body.documents
        calls = [message.get("tool_calls") for message in self._messages]
        return sum(map(len, shown)) + len(json.dumps([extras, calls]))

    def _encode(self, encoder: PromptEncoder) -> list[list[int]]:
        body = self._body
        messages = encoder.with_system_prompt(self._messages)
        own = body.chat_template if body.chat_template is not None else encoder.own_template
        template = self._vocabulary.chat_template(own, with_tools=bool(self._tools))
        tools = [tool.for_template() for tool in self._tools]
        if self._tools:
            self._format = self._choose_format(template)
        if not template.knows("tools"):
            messages, tools = with_tools_in_text(messages, tools), []
        text = self._vocabulary.render_chat(
            messages,
            self._template_args(template),
            template=template.text,
            options=RenderOptions(
                tools=tools,
                documents=body.documents or (),
                adds_generation_prompt=self._adds_generation_prompt,
                continues_final_message=bool(body.continue_final_message),
            ),
        )
        self._has_reasoning = template.has_reasoning and not body.continue_final_message
        self._begins_inside = self._has_reasoning and text.rstrip().endswith(OPENING)
        self._demands = self._made_demands()
        # The template writes the special tokens itself; the tokenizer's would be a second set.
        return [encoder.encode(text, add_special_tokens=bool(body.add_special_tokens))]

    @property
    def _adds_generation_prompt(self) -> bool:
        return self._body.add_generation_prompt is not False and not (
            self._body.continue_final_message
        )

    def _choose_format(self, template: ChatTemplate) -> ToolFormat:
        chosen = choose_tool_format(template, self._setting)
        if chosen is None:
            reason = (
                "this server's setting tool_parser is `none`"
                if self._setting == "none"
                else "how this model's chat template writes calls is not known; set tool_parser"
            )
            raise InvalidRequest(f"`tools`: {reason}", param="tools")
        return chosen

    def _template_args(self, template: ChatTemplate) -> dict[str, Any]:
        """Return the template's variables; refuse what it would ignore."""
        body = self._body
        args = _known_args(template, body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            _check_known(template, "reasoning_effort", "reasoning_effort")
            args["reasoning_effort"] = body.reasoning_effort
        if body.documents:
            _check_known(template, "documents", "documents")
        if not template.knows_names:
            for index, message in enumerate(body.messages):
                if message.name is not None and message.role != "tool":
                    raise InvalidRequest(
                        f"`messages[{index}].name`: the model's chat template shows no names; "
                        "write the name into the text",
                        param=f"messages[{index}].name",
                    )
        return args

    def _made_demands(self) -> Demands:
        tool_format = self._format
        if tool_format is None:
            return Demands()
        marks = (tool_format.syntax.opening, tool_format.syntax.closing, "[ARGS]")
        token_id = self._vocabulary.special_token_id
        shows_special = any(token_id(mark) is not None for mark in marks if mark)
        return Demands(self._grammar(tool_format), shows_special_tokens=shows_special)

    def _grammar(self, tool_format: ToolFormat) -> str | None:
        body = self._body
        is_strict = any(tool.function.strict for tool in self._tools)
        is_single = body.parallel_tool_calls is False
        if not (body.must_call or is_strict or is_single or self._text_schema is not None):
            return None
        rules = CallRules(
            functions=[
                (tool.function.name, _schema_of(tool, is_forced=body.must_call))
                for tool in self._tools
            ],
            is_forced=body.must_call,
            max_calls=self._max_calls,
            text_schema=self._text_schema,
            begins_inside_reasoning=self._begins_inside,
        )
        return call_grammar(tool_format, rules, self._vocabulary.special_token_id)


def _callable_tools(body: ChatBody) -> Sequence[Tool]:
    """Return the tools that the model may call: it is shown no others."""
    return [tool for tool in body.tools or () if tool.function.name in body.chosen_names]


def _text_schema(body: ChatBody) -> dict[str, Any] | None:
    """Return the JSON schema of a text beside tools; raises InvalidRequest for other shapes."""
    if body.shape is None:
        return None
    if body.shape.kind is ShapeKind.JSON_OBJECT:
        return {"type": "object"}
    if body.shape.kind is ShapeKind.JSON_SCHEMA and isinstance(body.shape.value, dict):
        return body.shape.value
    raise InvalidRequest(
        f"`{body.shape.param}`: beside `tools`, only a JSON object or schema can be asked for",
        param=body.shape.param,
    )


def _schema_of(tool: Tool, *, is_forced: bool) -> dict[str, Any]:
    """Return what holds of the arguments: those of tools that are not strict are the model's own,
    unless a call is forced."""
    if is_forced or tool.function.strict:
        return argument_schema(tool.function.parameters)
    return {"type": "object"}


def _known_args(template: ChatTemplate, args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables; one that the template does not know would change nothing."""
    for name, value in args.items():
        is_off_anyway = name == "enable_thinking" and value is False
        if template.knows(name) or is_off_anyway:
            continue
        reason = f"the model's chat template does not know `{name[:64]}`"
        if name == "enable_thinking":  # also what `thinking` of Messages becomes
            reason = f"the model cannot be told to reason: {reason}; leave it out"
        raise InvalidRequest(f"`chat_template_kwargs`: {reason}", param="chat_template_kwargs")
    return dict(args)


def _check_known(template: ChatTemplate, variable: str, param: str) -> None:
    if not template.knows(variable):
        raise InvalidRequest(f"`{param}`: the model's chat template does not know it", param=param)
