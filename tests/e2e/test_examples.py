"""The four trained adapters do what they were trained for; the base does not."""

from __future__ import annotations

import pytest

from clients.examples import score
from tests.e2e.conftest import ADAPTERS
from tests.support.engine import drive, greedy_request, make_core

pytestmark = pytest.mark.model

MAX_TOKENS = 96


@pytest.fixture(scope="module")
def rates(model, manifests, heldout, chat_prompts, vocabulary):
    """Pass rate by (adapter, arm): base and adapter together in one mixed batch."""
    core = make_core(model, num_pages=2048, max_running=64, max_step_tokens=512)
    requests = []
    for name in ADAPTERS:
        for i, prompt in enumerate(chat_prompts[name]):
            for arm, manifest in (("base", None), ("adapter", manifests[name])):
                request_id = f"{name}/{arm}/{i}"
                requests.append(greedy_request(request_id, prompt, manifest, max_tokens=MAX_TOKENS))
    outputs = drive(core, requests)
    core.close()
    decode = vocabulary.decoder(skip_special_tokens=True)
    return {
        (name, arm): sum(
            score.score(name, heldout[name][i], decode(outputs[f"{name}/{arm}/{i}"]))
            for i in range(len(heldout[name]))
        )
        / len(heldout[name])
        for name in ADAPTERS
        for arm in ("base", "adapter")
    }


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_passes_where_the_base_fails_in_one_mixed_batch(rates, name):
    assert rates[name, "adapter"] >= score.PASS_RATE[name], rates
    assert rates[name, "base"] <= score.BASE_MAX_RATE, rates


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_passes_alone(model, manifests, heldout, chat_prompts, vocabulary, name):
    core = make_core(model)
    outputs = drive(
        core, [greedy_request("r", chat_prompts[name][0], manifests[name], max_tokens=MAX_TOKENS)]
    )
    core.close()
    answer = vocabulary.decoder(skip_special_tokens=True)(outputs["r"])
    assert score.score(name, heldout[name][0], answer), answer
