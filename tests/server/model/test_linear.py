"""Packed linears: the values of `F.linear`, and rows that do not depend on their number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from loraplex_kernels.native import load_native
from loraplex_kernels.packed_linear import GROUP, PANEL
from loraplex_server.model import linear as linear_module
from loraplex_server.model.errors import UnsupportedModel
from loraplex_server.model.linear import Linear, can_pack

SHAPES = [(97, 32), (960, 576), (576, 1536), (64, 4096)]


@pytest.fixture(params=["own kernels", "oneDNN"])
def packing(request, monkeypatch):
    """Weights are packed by either; without a compiler it is oneDNN."""
    if request.param == "oneDNN":
        monkeypatch.setattr(linear_module, "load_native", lambda: None)
    return request.param


needs_kernels = pytest.mark.skipif(load_native() is None, reason="no C compiler")


def packed(out_features, in_features, *, has_bias=False, dtype=torch.float32, is_int8=False):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    bias = torch.randn(out_features, generator=generator).to(dtype) if has_bias else None
    linear = Linear(weight.clone(), bias)
    linear.pack(is_int8=is_int8)
    return linear, weight


def random_rows(count, width, dtype=torch.float32):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 33])
def test_a_packed_linear_gives_the_values_of_a_plain_one(shape, has_bias, rows, packing):
    linear, weight = packed(*shape, has_bias=has_bias)
    x = random_rows(rows, shape[1])
    expected = F.linear(x.double(), weight.double(), None if not has_bias else linear.bias.double())
    torch.testing.assert_close(linear(x).double(), expected, atol=1e-5 * shape[1] ** 0.5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_does_not_depend_on_how_many_are_beside_it(shape, dtype, packing):
    linear, weight = packed(*shape, dtype=dtype)
    if linear.packed is None and not can_pack(weight):
        pytest.skip("this machine's oneDNN does not take the dtype")
    x = random_rows(130, shape[1], dtype)
    together = linear(x)
    for count in (1, 2, 3, 8, 17, 64, 129):
        assert torch.equal(linear(x[:count]), together[:count])
    assert torch.equal(linear(x[77:78]), together[77:78])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_weight_can_be_read_back(dtype, packing):
    linear, weight = packed(97, 32, dtype=dtype)
    assert torch.equal(linear.dense_weight(), weight)


def test_a_packed_weight_takes_whole_panels():
    linear, weight = packed(97, 32)
    assert linear.num_bytes == -(-97 // PANEL) * PANEL * 32 * weight.element_size()


def test_a_dtype_that_is_not_packed_is_multiplied_plainly():
    linear, weight = packed(16, 8, dtype=torch.float64)
    x = random_rows(3, 8, torch.float64)
    assert torch.equal(linear(x), F.linear(x, weight))


# ---- int8 ------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_int8_weight_is_rounded_to_127_steps_of_each_group(shape, dtype):
    linear, weight = packed(*shape, dtype=dtype, is_int8=True)
    expected = []
    for group in weight.float().split(GROUP, 1):
        largest = group.abs().amax(1, keepdim=True)
        expected.append((group / largest * 127).round() * (largest / 127))
    assert torch.equal(linear.dense_weight(), torch.cat(expected, 1))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 33])
def test_an_int8_linear_multiplies_its_rounded_weight(shape, has_bias, rows, dtype):
    linear, _ = packed(*shape, has_bias=has_bias, dtype=dtype, is_int8=True)
    x = random_rows(rows, shape[1], dtype)
    bias = linear.bias.double() if has_bias else None
    expected = F.linear(x.double(), linear.dense_weight().double(), bias)
    found = linear.packed(x).double()
    torch.testing.assert_close(found, expected, atol=1e-5 * shape[1] ** 0.5, rtol=1e-5)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_of_an_int8_linear_does_not_depend_on_how_many_are_beside_it(shape, dtype):
    linear, _ = packed(*shape, has_bias=True, dtype=dtype, is_int8=True)
    x = random_rows(300, shape[1], dtype)
    together = linear.packed(x)
    for count in (*range(1, 18), 64, 255, 256, 257):
        assert torch.equal(linear.packed(x[:count]), together[:count])
    assert torch.equal(linear.packed(x[77:78]), together[77:78])


@needs_kernels
def test_an_int8_weight_takes_a_byte_each_and_its_scales():
    linear, _ = packed(960, 576, dtype=torch.bfloat16, is_int8=True)
    num_groups = -(-576 // GROUP)
    assert linear.num_bytes == 960 * (576 + 4 * num_groups)


@needs_kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_not_made_finite_by_rounding(value):
    weight = torch.ones(PANEL + 1, 2 * GROUP)
    weight[PANEL, GROUP] = value
    linear = Linear(weight)
    linear.pack(is_int8=True)
    y = linear(torch.ones(1, 2 * GROUP))[0]
    assert torch.equal(y.isfinite(), torch.arange(PANEL + 1) != PANEL)


@needs_kernels
def test_outputs_of_zeros_stay_zero():
    linear = Linear(torch.zeros(PANEL, GROUP))
    linear.pack(is_int8=True)
    assert torch.equal(linear(torch.ones(9, GROUP)), torch.zeros(9, PANEL))


def test_int8_without_kernels_that_take_the_weight_is_refused(monkeypatch):
    with pytest.raises(UnsupportedModel, match=r"quantization = 'int8'.*even width"):
        Linear(torch.ones(4, 3).bfloat16()).pack(is_int8=True)
    monkeypatch.setattr(linear_module, "load_native", lambda: None)
    with pytest.raises(UnsupportedModel, match="compiled kernels"):
        Linear(torch.ones(4, 4)).pack(is_int8=True)
