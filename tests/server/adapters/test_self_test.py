"""The self-test: quiet about what is right, loud about any error in packing or kernels."""

from __future__ import annotations

import pytest
import torch

from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_weights import AdapterWeights, LoRAPair
from loraplex_memory.layout import PROJECTIONS, PoolLayout
from loraplex_server.adapters import self_test as module
from loraplex_server.adapters.errors import SelfTestFailed
from loraplex_server.adapters.self_test import self_test
from tests.support.adapters import TINY


def make_weights(*, rank=5, scale=0.5, size=1.0, dtype=torch.float32) -> AdapterWeights:
    """LoRA everywhere but on one module; output scales, biases and model parts as well."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return (torch.randn(*shape, generator=generator) * size).to(dtype)

    lora = {
        (layer, p): LoRAPair(
            random(rank + layer, TINY.in_features(p)),
            random(TINY.out_features(p), rank + layer),
            scale,
        )
        for layer in range(TINY.num_layers)
        for p in PROJECTIONS
        if (layer, p) != (1, "k")
    }
    parts = {
        ("out_scale.q", 0): random(1, TINY.out_features("q")),
        ("bias.q", 1): random(1, TINY.out_features("q")),
        ("out_scale.k", 1): random(1, TINY.out_features("k")),
        ("soft_prompt", None): random(3, TINY.hidden_size),
        ("norm.input", 1): random(1, TINY.hidden_size),
    }
    return AdapterWeights(lora, parts)


def run(weights: AdapterWeights) -> float:
    return self_test(weights, AdapterLayout(PoolLayout(TINY), weights.spec(TINY.num_layers)))


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sound_adapter_differs_by_rounding_alone(size, dtype):
    assert run(make_weights(size=size, dtype=dtype)) < 2e-6


def test_terms_that_cancel_are_no_error():
    a = torch.randn(1, 64)
    pair = LoRAPair(torch.cat([a, a]), torch.tensor([1e4, -1e4]).repeat(64, 1), 1.0)
    assert run(AdapterWeights({(0, "q"): pair})) < 2e-6


def test_an_adapter_without_any_linear_is_judged_by_its_parts():
    assert run(AdapterWeights({}, {("soft_prompt", None): torch.randn(4, 64)})) == 0.0


@pytest.mark.parametrize("place", range(8))
def test_any_change_of_the_packed_bytes_is_found(monkeypatch, place):
    weights = make_weights()
    layout = AdapterLayout(PoolLayout(TINY), weights.spec(TINY.num_layers))
    real = module.pack_adapter

    def pack_badly(*args, **kwargs):
        packed = real(*args, **kwargs)
        flat = packed.view(-1)
        used = flat.nonzero().flatten()
        flat[used[place * (len(used) - 1) // 7]] += 3.0
        return packed

    monkeypatch.setattr(module, "pack_adapter", pack_badly)
    with pytest.raises(SelfTestFailed, match="bug of the server"):
        self_test(weights, layout)


def test_a_kernel_that_touches_other_rows_is_found(monkeypatch):
    real = module.add_lora

    def touch_all(y, *args, **kwargs):
        real(y, *args, **kwargs)
        y[0] += 0.1

    monkeypatch.setattr(module, "add_lora", touch_all)
    with pytest.raises(SelfTestFailed):
        run(make_weights())
