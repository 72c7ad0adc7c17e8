"""The arithmetic of the accuracy benchmark, on figures that can be told by hand."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "server/bench/bench_accuracy.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_accuracy", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # its dataclasses look themselves up there
        spec.loader.exec_module(module)
        yield module


def test_same_tokens_counts_whole_answers_and_places(bench):
    expected = [(1, 2, 3), (4, 5, 6), (7,)]
    found = [(1, 2, 3), (4, 9, 6), (7, 8)]
    shares = bench.same_tokens(expected, found)
    assert shares == {"prompts": pytest.approx(1 / 3), "tokens": pytest.approx(6 / 7)}


def test_an_answer_that_ends_early_lacks_the_tokens_behind_its_end(bench):
    shares = bench.same_tokens([(1, 2, 3, 4)], [(1, 2)])
    assert shares == {"prompts": 0.0, "tokens": 0.5}


def test_equal_logits_have_no_errors(bench):
    errors = bench.LogitErrors()
    logits = torch.randn(3, 64)
    errors.add(logits, logits.clone())
    summary = errors.summary()
    for key in ("logit", "margin", "kl"):
        assert all(value == 0.0 for value in summary[key].values())
    assert summary["same_best"] == 1.0


def test_errors_are_of_logits_of_the_margin_and_of_the_distribution(bench):
    """Two even tokens of 16; then one is twice as likely: ln 2 more, and so much more margin."""
    expected, found = torch.full((1, 16), -1e9), torch.full((1, 16), -1e9)
    expected[0, :2] = 0.0
    found[0, :2] = torch.tensor([0.0, math.log(2)])
    errors = bench.LogitErrors()
    errors.add(expected, found)
    summary = errors.summary()
    assert summary["logit"]["max"] == pytest.approx(math.log(2))
    assert summary["logit"]["mean"] == pytest.approx(math.log(2) / 16)
    assert summary["margin"]["mean"] == pytest.approx(math.log(2))
    # KL((1/2, 1/2) || (1/3, 2/3)) = ln 3 - 1.5 ln 2
    assert summary["kl"]["mean"] == pytest.approx(math.log(3) - 1.5 * math.log(2), rel=1e-5)


class Characters:
    """A vocabulary of characters, and no chat template."""

    def __init__(self, tokenizer, size):
        pass

    def render_chat(self, messages):
        return messages[0]["content"]

    def encode(self, text, add_special_tokens):
        return [ord(c) for c in text]


def test_prompts_are_distinct_and_the_same_in_every_run(bench, monkeypatch):
    monkeypatch.setattr(bench, "spec_of", lambda source: SimpleNamespace(vocab_size=1 << 20))
    monkeypatch.setattr(bench, "Vocabulary", Characters)
    source = SimpleNamespace(load_tokenizer=lambda: None)
    first, again = bench.make_prompts(source, 50), bench.make_prompts(source, 50)
    assert first == again
    assert len(set(first)) == 200
