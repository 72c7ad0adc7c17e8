"""The baselines compute what ours compute: a race against a wrong answer proves nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from loraplex_kernels import reference
from loraplex_memory.layout import ModelGeometry
from tests.support.kernel_cases import SMOLLM2, make_lora_case

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels/bench"))

from baseline_site import Site
from baselines import BASELINES

SMALL = ModelGeometry(
    num_layers=1,
    hidden_size=96,
    num_heads=3,
    num_kv_heads=1,
    head_dim=32,
    intermediate_size=160,
)
#: Projection indices and the widths of input and outputs of two sites, fused and single.
SITES = {"qkv": (0, 1, 2), "down": (6,)}


def make_site(geometry, site, ranks, rows, dtype):
    projections = SITES[site]
    adapter_ranks = [[[rank] * 7 for _ in range(geometry.num_layers)] for rank in ranks]
    case = make_lora_case(adapter_ranks, rows, geometry=geometry, dtype=dtype)
    names = ("q", "k", "v", "o", "gate", "up", "down")
    outs = tuple(geometry.out_features(names[p]) for p in projections)
    in_features = geometry.in_features(names[projections[0]])
    layer = geometry.num_layers - 1
    return Site(case.pool.layer(layer), case.batch, layer, projections, in_features, outs)


def assert_matches_reference(name, site, num_tokens, dtype, tolerance):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_tokens, site.in_features, generator=generator).to(dtype)
    base = torch.randn(num_tokens, sum(site.out_features), generator=generator).to(dtype)
    expected, actual = base.clone(), base.clone()
    reference.add_lora(
        expected,
        x,
        site.pool_layer,
        site.batch,
        layer=site.layer,
        projections=site.projections,
        out_features=site.out_features,
    )
    BASELINES[name](site)(actual, x)
    assert not torch.equal(expected, base)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_mixed_ranks_and_rows_without_an_adapter(name, site, dtype, tolerance):
    made = make_site(SMALL, site, [8, 1, 16], [[0, 5], [6], [2, 3, 1]], dtype)
    assert_matches_reference(name, made, 8, dtype, tolerance)


@pytest.mark.parametrize("name", BASELINES)
def test_more_rows_than_a_tile_on_one_adapter(name):
    made = make_site(SMALL, "qkv", [2, 40], [list(range(19)), [20]], torch.float32)
    assert_matches_reference(name, made, 21, torch.float32, 1e-4)


@pytest.mark.parametrize("name", BASELINES)
def test_sizes_that_are_not_powers_of_two(name):
    made = make_site(SMOLLM2, "down", [3], [[1, 0]], torch.float32)
    assert_matches_reference(name, made, 2, torch.float32, 1e-4)


@pytest.mark.parametrize("name", BASELINES)
def test_an_adapter_without_the_module_adds_nothing(name):
    made = make_site(SMALL, "down", [0, 4], [[0], [1]], torch.float32)
    assert_matches_reference(name, made, 2, torch.float32, 1e-4)
