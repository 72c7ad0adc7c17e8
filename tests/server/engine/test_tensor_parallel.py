"""One model on several ranks: the tokens of one, whoever is served and whatever happens to them."""

from __future__ import annotations

import pytest
import torch

from loraplex_memory.adapter_file import write_adapter_file
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_memory.layout import PROJECTIONS
from loraplex_server.model.spec import ModelSpec
from tests.support.adapter_kinds import make_mixture, make_requests, save_kinds
from tests.support.adapter_parts import HEAD_DIM, make_adapters
from tests.support.engine import drive, greedy_request, make_core
from tests.support.kernel_cases import make_weights
from tests.support.ranks import ThreadTeam
from tests.support.tiny_models import tiny_config, tiny_reference, transformer_of

#: The model has 4 heads and 2 KV heads: cut evenly; padded; with KV heads on two ranks each.
RANKS = [2, 3, 4]


@pytest.fixture(scope="module", params=["llama", "qwen3"], name="reference")
def _reference(request):
    return tiny_reference(tiny_config(request.param, head_dim=HEAD_DIM))


@pytest.fixture(scope="module", name="manifests")
def _manifests(reference, tmp_path_factory):
    return save_kinds(tmp_path_factory.mktemp("adapters"), make_adapters(reference))


@pytest.fixture(scope="module", name="requests_")
def _requests(manifests):
    return [*make_requests(manifests), make_mixture("mixture", manifests, max_tokens=6)]


@pytest.fixture(scope="module", name="right")
def _right(reference, requests_):
    core = make_core(transformer_of(reference))
    tokens = drive(core, requests_)
    core.close()
    return tokens


@pytest.fixture(name="team")
def _team(reference):
    teams = []

    def make(num_ranks, **sizes):
        spec = ModelSpec.from_config(reference.config, base_name="tiny")
        teams.append(ThreadTeam(spec, reference.state_dict(), num_ranks, **sizes))
        return teams[-1]

    yield make
    for team in teams:
        team.close()


@pytest.mark.parametrize("num_ranks", RANKS)
def test_all_kinds_of_adapters_in_one_batch(team, num_ranks, requests_, right):
    assert drive(team(num_ranks).core, requests_) == right


@pytest.mark.parametrize("num_ranks", RANKS)
def test_adapters_evicted_and_requests_preempted(team, num_ranks, requests_, right):
    core = team(num_ranks, num_pages=60, max_step_tokens=64).core
    for _ in range(2):
        assert drive(core, requests_) == right
    stats = core.stats()
    assert stats.num_evictions > 10
    assert stats.prefix_hit_tokens > 0


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_what_is_sent_follows_the_papers_formula(team, reference, tmp_path, num_ranks):
    """S-LoRA, section 6: `2 (N-1) B h / N` for the base's all-reduce of attention, and
    `5 (N-1) B r / N` more for LoRA on q, k, v and o; here the MLP's all-reduce comes on top.
    """
    num_layers, hidden, batch, rank, elem_bytes = 2, 32, 4, 8, 4
    geometry = ModelSpec.from_config(reference.config, base_name="tiny").geometry
    row = [rank if p in ("q", "k", "v", "o") else 0 for p in PROJECTIONS]
    generator = torch.Generator().manual_seed(0)
    weights = AdapterWeights(make_weights(geometry, [row] * num_layers, generator))
    path = tmp_path / "a.safetensors"
    write_adapter_file(path, weights)
    manifest = AdapterManifest("a", str(path), weights.spec(num_layers))
    team = team(num_ranks)
    requests = [
        greedy_request(f"{i}", [5 + i], manifest, max_tokens=9, ignore_eos=True)
        for i in range(batch)
    ]
    drive(team.core, requests)
    # As many steps of `batch` rows as tokens: the prompts are one token each.
    num_steps, n = 9, num_ranks
    for group in team.groups:
        sent = group.traffic.num_bytes
        unit = num_steps * num_layers * batch * (n - 1) * elem_bytes // n
        assert sent["lora"] == 5 * rank * unit
        assert sent["base"] == 2 * (2 * hidden) * unit
