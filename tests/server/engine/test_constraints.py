"""Answers that follow grammars, on a random model: it would write anything, were it allowed to."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import threading
import time

import pytest

from loraplex_scheduler.plan import EndEvent, FinishReason, Request, TokenEvent
from loraplex_scheduler.policies import PolicyChoice
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.engine.grammar_compiler import GrammarCompiler
from loraplex_server.text import grammars
from tests.support.engine import finish, greedy_request, make_core, make_device_core
from tests.support.tiny_models import tiny_transformer
from tests.support.tiny_tokenizer import make_tokenizer

END = 0
PERSON = grammars.json_schema(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
)
DATE = grammars.regex(r"\d{4}-\d{2}-\d{2}")
COLOUR = grammars.choice(["red", "green", "blue"])


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_transformer(vocab_size=300, eos_token_id=END)


@pytest.fixture
def core(model, tokenizer):
    core = make_core(model, tokenizer=tokenizer)
    yield core
    core.close()


def request(name, grammar, *, seed=0, temperature=1.0, max_tokens=120, num_prompt=4, **options):
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, seed=seed, grammar=grammar, **options
    )
    return Request(name, tuple(range(5, 5 + num_prompt)), params)


def text_of(tokenizer, events):
    assert all(isinstance(event, TokenEvent) for event in events), events[-1]
    return tokenizer.decode([e.token.token_id for e in events if e.token.token_id != END])


def mixed_requests():
    asked = [(f"{name} {i}", g, i) for name, g in GRAMMARS.items() for i in range(4)]
    return [request(name, g, seed=i, temperature=float(i > 0)) for name, g, i in asked]


GRAMMARS = {"person": PERSON, "date": DATE, "colour": COLOUR}


def test_answers_follow_their_grammars_side_by_side(core, tokenizer):
    events = finish(core, [*mixed_requests(), greedy_request("free", (5, 6, 7))])
    for name, own in events.items():
        text = text_of(tokenizer, own)
        kind = name.split()[0]
        if kind == "person":
            assert own[-1].finish_reason is FinishReason.STOP
            person = json.loads(text)
            assert set(person) == {"name", "age", "tags"}
            assert 0 <= person["age"] <= 150
        elif kind == "date":
            assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", text)
        elif kind == "colour":
            assert text in ("red", "green", "blue")
            assert own[-1].token.token_id == END
    assert not core._constraints.knows("person 0")


def tokens_of(events):
    return {name: [e.token.token_id for e in own] for name, own in events.items()}


def test_an_answer_is_the_same_alone_and_after_giving_way(model, tokenizer):
    alone = {}
    for one in mixed_requests():
        core = make_core(model, tokenizer=tokenizer)
        alone |= tokens_of(finish(core, [one]))
        core.close()
    greedy = PolicyChoice(admission="greedy")
    core = make_core(model, num_pages=9, max_model_len=128, choice=greedy, tokenizer=tokenizer)
    assert tokens_of(finish(core, mixed_requests())) == alone
    assert core.stats().num_preemptions > 0
    core.close()


def test_log_probabilities_stay_those_of_the_model(core):
    (constrained, *_) = finish(core, [request("r", DATE, logprobs=2, temperature=0.0)])["r"]
    (free, *_) = finish(
        core, [Request("f", (5, 6, 7, 8), SamplingParams(temperature=0.0, logprobs=2))]
    )["f"]
    assert constrained.token.logprobs.top == free.token.logprobs.top


def test_an_answer_that_must_end_before_min_tokens_is_refused_alone(core):
    events = finish(core, [request("r", DATE, min_tokens=40), request("fine", DATE)])
    end = events["r"][-1]
    assert isinstance(end, EndEvent)
    assert end.finish_reason is FinishReason.REFUSED
    assert "grammar of the answer and `min_tokens`" in end.message
    assert events["fine"][-1].finish_reason is FinishReason.STOP


def test_an_answer_that_may_go_on_waits_for_min_tokens(core, tokenizer):
    grammar = grammars.regex("a+")
    (own,) = finish(core, [request("r", grammar, min_tokens=20, max_tokens=60)]).values()
    assert len(own) >= 20
    assert set(text_of(tokenizer, own)) == {"a"}


def test_a_grammar_and_allowed_tokens_both_hold(core, tokenizer):
    ids = frozenset(tokenizer.convert_tokens_to_ids(["1", "7", "-"])) | {END}
    events = finish(core, [request("r", DATE, allowed_token_ids=ids)])["r"]
    assert set(text_of(tokenizer, events)) <= set("17-")


def test_a_grammar_of_unknown_tokens_is_refused_with_its_name(core):
    events = finish(core, [request("r", grammars.lark("start: <|nobody|>"))])["r"]
    (end,) = events
    assert end.finish_reason is FinishReason.REFUSED
    assert "nobody" in end.message


def test_a_named_token_of_the_model_can_be_asked_for(core, tokenizer):
    (special,) = tokenizer.convert_tokens_to_ids(["<|system|>"])
    events = finish(core, [request("r", grammars.lark('start: <|system|> "hello"'))])["r"]
    assert events[0].token.token_id == special


class GatedCompiler(GrammarCompiler):
    """Compiles nothing before its gate is open."""

    def __init__(self):
        super().__init__(300, {END}, lambda: None)
        self.gate = threading.Event()

    def _matcher(self, grammar, tokenizer):
        assert self.gate.wait(60)
        return super()._matcher(grammar, tokenizer)


def gated(model, tokenizer):
    core = make_core(model, tokenizer=tokenizer)
    compiler = core._constraints.compiler = GatedCompiler()
    core.learn_tokens(tokenizer.backend_tokenizer.to_str())
    return core, compiler


def test_a_deadline_holds_while_a_grammar_is_compiled(model, tokenizer):
    core, compiler = gated(model, tokenizer)
    now = time.monotonic()
    core.add(dataclasses.replace(request("late", DATE), deadline_s=now))
    core.add(dataclasses.replace(request("patient", DATE), deadline_s=now + 600.0))
    (end,) = core.step()
    assert (end.request_id, end.finish_reason) == ("late", FinishReason.TIMED_OUT)
    assert core.stats().num_waiting == 1
    compiler.gate.set()
    events = []
    while core.has_work:
        events += core.step(load_timeout_s=5.0)
    assert {e.request_id for e in events} == {"patient"}
    assert events[-1].finish_reason is FinishReason.STOP
    core.close()


def test_others_go_on_while_a_grammar_is_compiled(model, tokenizer):
    core, compiler = gated(model, tokenizer)
    assert core.add(request("slow", DATE)) == []
    assert core.add(request("gone", DATE)) == []
    core.add(greedy_request("other", (5, 6), max_tokens=5, ignore_eos=True))
    events = [e for _ in range(8) for e in core.step()]
    assert {e.request_id for e in events} == {"other"}
    assert core.is_waiting_for_loads
    assert core.has_work
    assert core.stats().num_waiting == 2
    (end,) = core.abort("gone")
    assert end.finish_reason is FinishReason.CANCELLED
    compiler.gate.set()
    events = []
    while core.has_work:
        events += core.step(load_timeout_s=5.0)
    assert {e.request_id for e in events} == {"slow"}
    assert events[-1].finish_reason is FinishReason.STOP
    core.close()


def test_without_the_package_a_grammar_is_refused_and_nothing_else(core, monkeypatch):
    for name in list(sys.modules):
        if name.startswith("llguidance"):
            monkeypatch.setitem(sys.modules, name, None)
    events = finish(core, [request("r", DATE), greedy_request("fine", (5, 6))])
    (end,) = events["r"]
    assert end.finish_reason is FinishReason.REFUSED
    assert "`llguidance` is not installed" in end.message
    assert events["fine"][-1].finish_reason is not FinishReason.FAILED


def test_an_engine_without_a_tokenizer_says_so(model):
    core = make_core(model)
    (end,) = core.add(request("r", DATE))
    assert end.finish_reason is FinishReason.REFUSED
    assert "tokenizer" in end.message
    core.close()


def test_a_request_id_in_use_is_refused(core):
    core.add(request("r", DATE))
    (end,) = core.add(request("r", DATE))
    assert "in use" in end.message


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.slow
def test_a_device_follows_grammars_too(model, tokenizer):
    wishes = [
        request("date", DATE, temperature=0.0, max_tokens=8),
        request("colour", COLOUR, seed=3, max_tokens=8),
        request("stuck", COLOUR, min_tokens=8, max_tokens=8),
    ]
    plain = dataclasses.replace(wishes[1], request_id="words")
    params = SamplingParams(
        max_tokens=6,
        temperature=0.0,
        bad_words=((7,), (9, 11)),
        allowed_token_ids=frozenset({7, 9, 11}),
    )
    wishes.append(dataclasses.replace(plain, sampling=params))
    on_cpu = make_core(model, tokenizer=tokenizer)
    expected = finish(on_cpu, wishes)
    on_cpu.close()
    core = make_device_core(model, max_running=4, tokenizer=tokenizer)
    found = finish(core, wishes)
    core.close()
    assert found["stuck"][-1].finish_reason is FinishReason.REFUSED
    for name in ("date", "colour", "words"):
        assert [e.token.token_id for e in found[name]] == [e.token.token_id for e in expected[name]]
