"""The times of steps, worked out by hand for Llama-7B on an A100-80G."""

from __future__ import annotations

import pytest

from loraplex_memory.layout import PoolLayout
from loraplex_scheduler.step_times import StepLoad
from loraplex_server.simulator.hardware import find_hardware
from loraplex_server.simulator.models import MODELS, AdapterSet
from loraplex_server.simulator.roofline import Inefficiency, Roofline, StepWork

LLAMA = MODELS["llama-7b"]
A100 = find_hardware("a100-80g")
# 32 layers of 4 x 4096^2 + 3 x 4096 x 11008, and 32000 x 4096 for the output layer.
LAYER_PARAMS = 6_476_005_376
HEAD_PARAMS = 131_072_000


def make_roofline(page_tokens=16, **inefficiency):
    layout = PoolLayout(LLAMA.geometry, page_tokens)
    return Roofline(LLAMA, A100, layout, Inefficiency(**inefficiency))


def test_a_decode_step_is_bound_by_the_weights_and_keys_and_values_it_reads():
    work = StepWork(num_tokens=8, num_sampled=8, kv_tokens=4000, attended=4000, adapter_pages=0)
    kv_bytes = 2 * 32 * 2 * 4096
    num_bytes = 2 * (LAYER_PARAMS + HEAD_PARAMS) + 4008 * kv_bytes
    assert make_roofline().work_s(work) == pytest.approx(num_bytes / 2.039e12)


def test_a_prefill_step_is_bound_by_arithmetic():
    work = StepWork(
        num_tokens=2048, num_sampled=1, kv_tokens=2048, attended=2048 * 1024.5, adapter_pages=0
    )
    flops = 2 * 2048 * LAYER_PARAMS + 2 * HEAD_PARAMS + 4 * 32 * 4096 * 2048 * 1024.5
    assert make_roofline().work_s(work) == pytest.approx(flops / 312e12)


def test_an_adapter_costs_its_bytes():
    rank_64 = 2 * 64 * 8 * 4096 * 32  # two bytes, rank, four inputs and four outputs, layers
    pages = 4 * 64 // 16
    alone = StepWork(num_tokens=1, num_sampled=1, kv_tokens=1, attended=1, adapter_pages=0)
    adapted = StepWork(num_tokens=1, num_sampled=1, kv_tokens=1, attended=1, adapter_pages=pages)
    roofline = make_roofline()
    extra_s = roofline.work_s(adapted) - roofline.work_s(alone)
    assert extra_s == pytest.approx(rank_64 / 2.039e12)
    assert roofline.adapter_s(pages) == pytest.approx(rank_64 / 25e9)


def test_inefficiency_multiplies_the_device_and_adds_the_host():
    work = StepWork(num_tokens=1, num_sampled=1, kv_tokens=1, attended=1, adapter_pages=0)
    best = make_roofline().work_s(work)
    assert make_roofline(factor=2.0, overhead_s=0.003).work_s(work) == pytest.approx(
        2 * best + 0.003
    )


def test_policies_are_told_what_the_device_will_take():
    roofline = make_roofline()
    work = StepWork(num_tokens=8, num_sampled=8, kv_tokens=4000, attended=4000, adapter_pages=5)
    load = StepLoad(num_tokens=8, num_sequences=8, kv_tokens=4000, adapter_pages=5)
    assert roofline.step_s(load) == pytest.approx(roofline.work_s(work))
    assert roofline.prefix_page_s() == pytest.approx(16 * 2 * LAYER_PARAMS / 312e12)


def test_sizes_are_those_that_s_lora_counts_in_tokens():
    layout = PoolLayout(LLAMA.geometry, 1)
    ranks = AdapterSet((8, 64)).layer_ranks(1, 32)
    from loraplex_memory.adapter_layout import AdapterLayout
    from loraplex_memory.adapter_spec import AdapterSpec

    assert AdapterLayout(layout, AdapterSpec(ranks)).num_pages == 4 * 64
    assert LLAMA.kv_bytes == 2 * 2 * 32 * 4096
    assert LLAMA.layer_params == LAYER_PARAMS
