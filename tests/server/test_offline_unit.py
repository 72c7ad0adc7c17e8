"""The offline engine on a tiny random model: what it refuses, and what it leaves behind."""

from __future__ import annotations

import pytest

from loraplex_scheduler.errors import RequestRefused
from loraplex_scheduler.plan import FinishReason, Pooling
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server import Engine
from loraplex_server.config import Config
from loraplex_server.text import grammars
from loraplex_server.text.errors import UnknownToken
from tests.support.tiny_models import save_tiny_model
from tests.support.tiny_tokenizer import make_tokenizer

#: More ids than the tokenizer knows, as models have that pad their embedding.
VOCAB = 320


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder, vocab_size=VOCAB)
    make_tokenizer().save_pretrained(folder)
    with Engine(Config(model=str(folder), dtype="float32", pool_bytes=1 << 20)) as engine:
        yield engine


def sampling(max_tokens=4, **options):
    options = {"temperature": 0.0, "ignore_eos": True, **options}
    return SamplingParams(max_tokens=max_tokens, **options)


def assert_idle(engine):
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.pages_kv) == (0, 0, 0)


def test_ids_at_the_end_of_the_models_vocabulary_are_fine(engine):
    (answer,) = engine.generate([[5, VOCAB - 1]], sampling=sampling())
    assert answer.finish_reason is FinishReason.LENGTH
    assert len(answer.token_ids) == 4


@pytest.mark.parametrize(
    ("prompt", "options", "param"),
    [
        ([5, VOCAB], {}, "prompts"),
        ([-1], {}, "prompts"),
        ([5], {"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ([5], {"stop_token_ids": frozenset({5, -2})}, "stop_token_ids"),
        ([5], {"allowed_token_ids": frozenset({5, VOCAB})}, "allowed_token_ids"),
        ([5], {"bad_words": ((5, VOCAB),)}, "bad_words"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused_and_nothing_starts(engine, prompt, options, param):
    with pytest.raises(UnknownToken) as refused:
        engine.generate(["hello", prompt], sampling=sampling(**options))
    assert refused.value.param == param
    assert_idle(engine)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_breaks_a_call_off_leaves_nothing_running(engine, monkeypatch, error):
    step, num_steps = engine._core.step, []

    def breaking_step(**options):
        num_steps.append(1)
        if len(num_steps) == 3:
            raise error
        return step(**options)

    monkeypatch.setattr(engine._core, "step", breaking_step)
    with pytest.raises(error):
        engine.generate(["hello"] * 3, sampling=sampling(50))
    assert_idle(engine)
    monkeypatch.undo()
    engine._core.check()
    assert engine.generate(["hello"], sampling=sampling())[0].text


def test_an_answer_follows_a_grammar(engine):
    grammar = grammars.choice(["hello", "world"])
    params = sampling(20, grammar=grammar, ignore_eos=False, allowed_token_ids=None)
    (answer,) = engine.generate(["say"], sampling=params)
    assert answer.text in ("hello", "world")


def test_prompts_are_embedded_and_scored(engine):
    last, mean = (engine.embed(["hello world"], pooling=pooling)[0] for pooling in Pooling)
    assert len(last) == len(mean) == 32
    assert last != mean
    assert engine.embed([[5]], pooling=Pooling.LAST) == engine.embed([[5]], pooling=Pooling.MEAN)
    (answer,) = engine.generate([[5, 6, 7]], sampling=sampling(prompt_logprobs=1))
    assert len(answer.prompt_logprobs) == 2


def test_a_prompt_that_cannot_be_embedded_is_named(engine):
    with pytest.raises(RequestRefused, match="prompt 1"):
        engine.embed([[5], []])
    assert_idle(engine)
