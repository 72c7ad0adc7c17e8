"""Requests that weigh their adapter or mix several, against the sum of the updates."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from loraplex_memory.adapter_weights import AdapterWeights, LoRAPair
from loraplex_memory.layout import PROJECTIONS
from loraplex_scheduler.plan import EndEvent, FinishReason
from loraplex_scheduler.policies import PolicyChoice
from tests.support.adapter_kinds import PROMPTS, make_request, save_kinds
from tests.support.adapter_parts import HEAD_DIM, expected_logits, make_adapters, patched
from tests.support.engine import drive, make_core, make_device_core
from tests.support.kernel_cases import make_weights
from tests.support.served import ServedModel
from tests.support.tiny_models import tiny_config, tiny_reference, transformer_of

#: Mixtures by name: adapters of three ranks and their weights.
MIXTURES = {
    "half": {"a": 0.5},
    "against": {"a": -1.5},
    "nothing": {"b": 0.0},
    "two": {"a": 1.0, "b": 0.5},
    "two others": {"b": 0.25, "a": 2.0},
    "three": {"c": 1.0, "a": -0.5, "b": 1.0},
    "plain": {"c": 1.0},
    "base": {},
}


@pytest.fixture(scope="module", name="reference")
def _reference():
    return tiny_reference(tiny_config(head_dim=HEAD_DIM))


@pytest.fixture(scope="module", name="adapters")
def _adapters(reference):
    """On all linears, on those of attention, and on different ones in each layer."""
    geometry = transformer_of(reference).spec.geometry
    ranks = {"a": [[4] * 7] * 2, "b": [[3, 3, 3, 3, 0, 0, 0]] * 2, "c": [[0] * 6 + [8], [1] * 7]}
    return {
        name: AdapterWeights(
            make_weights(geometry, rows, torch.manual_seed(len(name) + rows[1][0]))
        )
        for name, rows in ranks.items()
    }


@pytest.fixture(scope="module", name="manifests")
def _manifests(adapters, reference, tmp_path_factory):
    others = {name: made for name, made in make_adapters(reference).items() if name == "norms"}
    return save_kinds(tmp_path_factory.mktemp("adapters"), {**adapters, **others})


def mixed(request_id, manifests, mixture, prompt, **fields):
    names = list(mixture)
    request = make_request(request_id, manifests[names[0] if names else None], prompt, **fields)
    return dataclasses.replace(
        request,
        adapter_weight=mixture[names[0]] if names else 1.0,
        more_adapters=tuple((manifests[name], mixture[name]) for name in names[1:]),
    )


def merged(reference, adapters, mixture):
    """Return the transformers model with every update in its weights."""
    for name, weight in mixture.items():
        lora = {
            key: LoRAPair(pair.a, pair.b, pair.scale * weight)
            for key, pair in adapters[name].lora.items()
        }
        reference = patched(reference, AdapterWeights(lora))
    return reference


def all_requests(manifests, max_tokens=4):
    return [
        mixed(f"{name} {i}", manifests, mixture, prompt, max_tokens=max_tokens)
        for i, prompt in enumerate(PROMPTS)
        for name, mixture in MIXTURES.items()
    ]


def test_logits_of_mixtures_in_one_batch_are_those_of_merged_models(reference, adapters, manifests):
    served = ServedModel(transformer_of(reference), adapters)
    requests = all_requests(manifests)
    logits = served.logits_of(requests)
    for request, ours in zip(requests, logits, strict=True):
        model = merged(reference, adapters, MIXTURES[request.request_id[:-2]])
        theirs = expected_logits(model, None, request.prompt_token_ids)
        torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=1e-5)
        assert torch.equal(served.logits_of([request])[0], ours), "in other company"
    assert len({str(rows[-1, :4].tolist()) for rows in logits}) == 2 * len(MIXTURES) - 2


@pytest.fixture(scope="module", name="right")
def _right(reference, adapters, manifests):
    core = make_core(transformer_of(reference))
    tokens = drive(core, all_requests(manifests))
    core.close()
    for i, prompt in enumerate(PROMPTS):
        for name, mixture in MIXTURES.items():
            answer = tokens[f"{name} {i}"]
            model = merged(reference, adapters, mixture)
            logits = expected_logits(model, None, [*prompt, *answer[:-1]])[len(prompt) - 1 :]
            chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
            assert (logits.amax(1) - chosen).max() < 1e-4, name
    return tokens


@pytest.mark.parametrize(
    "sizes",
    [
        {"max_step_tokens": 7, "max_running": 5},
        {"max_running": 1},
        {"num_pages": 26, "max_step_tokens": 64},
        {"num_pages": 30, "choice": PolicyChoice(admission="greedy")},
    ],
    ids=["small chunks", "alone", "little memory", "preempted"],
)
def test_mixtures_get_the_same_tokens_whatever_happens(reference, manifests, right, sizes):
    core = make_core(transformer_of(reference), **sizes)
    for _ in range(2):  # weighted ones find nothing of those before, plain ones do
        assert drive(core, all_requests(manifests)) == right
    core.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_mixtures_on_the_triton_path(reference, manifests, right):
    core = make_device_core(transformer_of(reference), max_step_tokens=48)
    names = ("half 0", "two 1", "three 0", "plain 1", "base 0")
    requests = [r for r in all_requests(manifests, max_tokens=2) if r.request_id in names]
    assert drive(core, requests) == {name: right[name][:2] for name in names}
    core.close()


@pytest.mark.parametrize(
    ("mixture", "words"),
    [({"norms": 0.5}, "more than add"), ({"a": 1.0, "norms": 1.0}, "more than add")],
    ids=str,
)
def test_adapters_that_do_more_than_add_are_refused(reference, manifests, mixture, words):
    core = make_core(transformer_of(reference))
    (end,) = core.add(mixed("r", manifests, mixture, [5, 6]))
    assert isinstance(end, EndEvent)
    assert end.finish_reason is FinishReason.REFUSED
    assert words in end.message
    core.close()


def test_projections_are_all_there(adapters):
    assert {p for _, p in adapters["a"].lora} == set(PROJECTIONS)
