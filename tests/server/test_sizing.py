"""Sizes left to `auto`, by device, and settings that contradict each other or the machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraplex_memory.layout import ModelGeometry, PoolLayout
from loraplex_server import sizing
from loraplex_server.config import Config
from loraplex_server.engine.errors import EngineConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GIB = 1 << 30


@pytest.fixture
def _has_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * GIB, 141 * GIB))


@pytest.mark.usefixtures("_has_gpu")
def test_auto_takes_the_gpu_where_there_is_one():
    assert sizing.choose_device("auto") == CUDA
    assert sizing.choose_device("cuda") == CUDA
    assert sizing.choose_device("cpu") == CPU
    assert sizing.choose_dtype("auto", CUDA) is torch.bfloat16


def test_auto_is_the_cpu_elsewhere_and_asking_for_a_gpu_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sizing.choose_device("auto") == CPU
    with pytest.raises(EngineConfigError, match=r"nvidia-smi.*--device cpu"):
        sizing.choose_device("cuda")


@pytest.mark.usefixtures("_has_gpu")
def test_a_gpu_that_is_too_old_is_not_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert sizing.choose_device("auto") == CPU
    with pytest.raises(EngineConfigError, match=r"capability 7\.5.*need 8\.0.*--device cpu"):
        sizing.choose_device("cuda")


@pytest.mark.parametrize(
    ("settings", "device", "expected"),
    [
        ({}, CPU, (512, 64)),
        ({}, CUDA, (2048, 256)),
        ({"max_running": 4}, CPU, (512, 4)),
        ({"max_running": 700}, CPU, (700, 700)),
        ({"max_step_tokens": 16}, CUDA, (16, 16)),
        ({"max_step_tokens": 32, "max_running": 8}, CUDA, (32, 8)),
    ],
)
def test_a_step_has_room_for_a_token_of_everyone(settings, device, expected):
    sizes = sizing.choose_step_sizes(Config(**settings), device)
    assert (sizes.max_step_tokens, sizes.max_running) == expected


def test_a_step_smaller_than_what_runs_is_refused():
    with pytest.raises(EngineConfigError, match="max_step_tokens is 8 and max_running 9"):
        sizing.choose_step_sizes(Config(max_step_tokens=8, max_running=9), CPU)


@pytest.mark.usefixtures("_has_gpu")
def test_a_gpus_pool_leaves_room_for_the_largest_step():
    without = sizing.auto_pool_bytes(CUDA)
    assert without == int(0.92 * 100 * GIB)
    assert without - sizing.auto_pool_bytes(CUDA, step_bytes=3 * GIB) == 3 * GIB
    assert sizing.auto_pool_bytes(CUDA, step_bytes=200 * GIB) == 0


def test_a_cpus_pool_is_capped(monkeypatch):
    monkeypatch.setattr(sizing, "available_bytes", lambda: 8 * GIB)
    assert sizing.auto_pool_bytes(CPU) == 2 * GIB
    monkeypatch.setattr(sizing, "available_bytes", lambda: 800 * GIB)
    assert sizing.auto_pool_bytes(CPU) == 4 * GIB


LAYOUT = PoolLayout(ModelGeometry(4, 64, 4, 2, 16, 128), page_tokens=16)
PAGE_BYTES = LAYOUT.page_bytes(2)


@pytest.mark.parametrize(
    ("device", "free", "expected"),
    [(CPU, 8 * GIB, int(0.8 * GIB)), (CPU, 800 * GIB, 2 * GIB), (CUDA, 800 * GIB, 200 * GIB)],
)
def test_host_memory_for_adapters_is_a_share_of_what_is_free(monkeypatch, device, free, expected):
    monkeypatch.setattr(sizing, "available_bytes", lambda: free)
    assert sizing.choose_host_pages(None, LAYOUT, 2, device) == expected // PAGE_BYTES


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_host_memory_that_is_set_is_taken_and_may_be_none(monkeypatch, device):
    monkeypatch.setattr(sizing, "available_bytes", lambda: 1 * GIB)
    assert sizing.choose_host_pages(10 * GIB, LAYOUT, 2, device) == 10 * GIB // PAGE_BYTES
    assert sizing.choose_host_pages(PAGE_BYTES - 1, LAYOUT, 2, device) == 0
    assert sizing.choose_host_pages(0, LAYOUT, 2, device) == 0


#: Multi-head attention: pages of 16 tokens waste 3.4 % of what adapters take.
LLAMA_2 = ModelGeometry(32, 4096, 32, 32, 128, 11008)


@pytest.mark.parametrize(("page_tokens", "expected"), [(None, 4), (16, 16), (1, 1)])
def test_a_number_of_tokens_that_is_set_fills_a_page(page_tokens, expected):
    assert sizing.choose_page_tokens(page_tokens, LLAMA_2) == expected


def test_the_fewest_tokens_are_taken_where_adapters_waste_more_with_any_number(monkeypatch):
    monkeypatch.setattr(sizing, "_MAX_WASTE", -1.0)
    assert sizing.choose_page_tokens(None, LLAMA_2) == 4


# ---- several ranks -------------------------------------------------------------------------


@pytest.mark.usefixtures("_has_gpu")
def test_sizes_are_those_of_all_ranks_together(monkeypatch):
    monkeypatch.setattr(sizing, "available_bytes", lambda: 8 * GIB)
    cut = replace(LAYOUT, num_ranks=2)
    assert sizing.choose_num_pages(GIB, cut, 2) == sizing.choose_num_pages(GIB, LAYOUT, 2)
    for host_bytes in (None, GIB):
        pages = [sizing.choose_host_pages(host_bytes, x, 2, CPU) for x in (LAYOUT, cut)]
        assert pages[0] == pages[1] > 0
    assert sizing.auto_pool_bytes(CPU, num_ranks=2) == 2 * GIB
    one = sizing.auto_pool_bytes(CUDA, step_bytes=GIB)
    assert sizing.auto_pool_bytes(CUDA, step_bytes=GIB, num_ranks=4) == 4 * one


@pytest.mark.parametrize(("threads", "num_ranks", "expected"), [(8, 2, 4), (0, 2, 3), (1, 4, 1)])
def test_ranks_share_the_threads_of_their_replica(monkeypatch, threads, num_ranks, expected):
    monkeypatch.setattr(sizing, "num_processors", lambda: 6)
    config = Config(threads=threads, tensor_parallel=num_ranks)
    assert sizing.choose_num_threads(config) == expected


@pytest.mark.usefixtures("_has_gpu")
def test_each_rank_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert sizing.choose_device("cuda", rank=1) == torch.device("cuda", 1)
    sizing.check_num_ranks(Config(tensor_parallel=2), CUDA, LLAMA_2)
    with pytest.raises(EngineConfigError, match="tensor_parallel is 3 and torch sees 2 GPUs"):
        sizing.check_num_ranks(Config(tensor_parallel=3), CUDA, LLAMA_2)


# ---- quantization --------------------------------------------------------------------------


def test_nothing_is_quantized_unless_asked_for(monkeypatch):
    monkeypatch.setattr(sizing, "load_native", lambda: None)
    assert Config().quantization == "none"
    assert sizing.choose_quantization("none", CUDA) == "none"
    assert sizing.choose_quantization("none", CPU) == "none"


def test_int8_is_taken_where_there_are_kernels_and_refused_elsewhere(monkeypatch):
    monkeypatch.setattr(sizing, "load_native", lambda: object())
    assert sizing.choose_quantization("int8", CPU) == "int8"
    with pytest.raises(EngineConfigError, match=r"device a GPU.*--quantization none or --device"):
        sizing.choose_quantization("int8", CUDA)
    monkeypatch.setattr(sizing, "load_native", lambda: None)
    with pytest.raises(EngineConfigError, match=r"compiled kernels.*install a C compiler"):
        sizing.choose_quantization("int8", CPU)
