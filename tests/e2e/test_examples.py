"""The four trained adapters do what they were trained for; the base does not."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from tests.e2e.conftest import ADAPTERS, EXAMPLES
from tests.support.engine import drive, greedy_request, make_core

pytestmark = pytest.mark.model

NUM_EXAMPLES = 8
MAX_TOKENS = 96


@pytest.fixture(scope="module")
def score():
    spec = importlib.util.spec_from_file_location("example_score", EXAMPLES / "score.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rates(model, manifests, heldout, chat_prompts, vocabulary, score):
    """Pass rate by (adapter, arm): base and adapter together in one mixed batch."""
    core = make_core(model, num_pages=2048, max_running=64, max_step_tokens=512)
    requests = []
    for name in ADAPTERS:
        for i in range(NUM_EXAMPLES):
            prompt = chat_prompts[name][i]
            for arm, manifest in (("base", None), ("adapter", manifests[name])):
                request_id = f"{name}/{arm}/{i}"
                requests.append(greedy_request(request_id, prompt, manifest, max_tokens=MAX_TOKENS))
    outputs = drive(core, requests)
    core.close()
    decode = vocabulary.decoder(skip_special_tokens=True)
    return {
        (name, arm): sum(
            score.score(name, heldout[name][i], decode(outputs[f"{name}/{arm}/{i}"]))
            for i in range(NUM_EXAMPLES)
        )
        / NUM_EXAMPLES
        for name in ADAPTERS
        for arm in ("base", "adapter")
    }


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_passes_where_the_base_fails_in_one_mixed_batch(rates, score, name):
    assert rates[name, "adapter"] >= score.PASS_RATE[name], rates
    assert rates[name, "base"] <= score.BASE_MAX_RATE, rates


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_passes_alone(model, manifests, heldout, chat_prompts, vocabulary, score, name):
    core = make_core(model)
    outputs = drive(
        core, [greedy_request("r", chat_prompts[name][0], manifests[name], max_tokens=MAX_TOKENS)]
    )
    core.close()
    answer = vocabulary.decoder(skip_special_tokens=True)(outputs["r"])
    assert score.score(name, heldout[name][0], answer), answer
