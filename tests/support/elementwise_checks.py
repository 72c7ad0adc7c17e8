"""Checks of the elementwise kernels against their torch reference, on any device.

Inputs and expectations are made on the host. Rounding points are those of the reference: what no
sum over a row enters is compared bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from loraplex_kernels import reference
from loraplex_kernels.elementwise_triton import (
    add_rms_norm,
    rms_norm,
    rotate_and_store,
    silu_mul,
)

EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (576, 100, 4096)


def random_tensor(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(shape, generator=generator)).to(dtype)


def strided(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `x` on the device with NaN between its rows."""
    wide = torch.full((x.shape[0], x[0].numel() + 24), torch.nan, dtype=x.dtype, device=device)
    view = wide[:, 8 : 8 + x[0].numel()]
    view.copy_(x.flatten(1))
    return view.unflatten(1, x.shape[1:])


def assert_near(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Allow what the order of a sum and a chip's exp do: last bits, and few of them in half."""
    out = out.cpu()
    is_half = out.dtype != torch.float32
    slack = torch.finfo(out.dtype).eps * (2 if is_half else 32)
    torch.testing.assert_close(out, expected, rtol=slack, atol=1e-30)
    if is_half:
        assert float((out != expected).float().mean()) < 0.02


def rms_norm_agrees(device: torch.device) -> None:
    for dtype in DTYPES:
        for width in WIDTHS:
            x = random_tensor(5, width, dtype=dtype)
            weight = random_tensor(width, dtype=dtype, seed=1)
            out = rms_norm(x.to(device), weight.to(device), EPS)
            assert_near(out, reference.rms_norm(x, weight, EPS))


def add_rms_norm_agrees_and_updates_the_residual(device: torch.device) -> None:
    for dtype in DTYPES:
        for width in WIDTHS:
            x, residual = (random_tensor(5, width, dtype=dtype, seed=s) for s in (0, 1))
            weight = random_tensor(width, dtype=dtype, seed=2)
            on_device = residual.to(device)
            out, total = add_rms_norm(x.to(device), on_device.clone(), weight.to(device), EPS)
            expected, expected_total = reference.add_rms_norm(x.clone(), residual, weight, EPS)
            assert_near(out, expected)
            assert torch.equal(total.cpu(), expected_total)


def norms_take_strided_rows_and_write_where_told(device: torch.device) -> None:
    x, residual = (random_tensor(4, 100, dtype=torch.bfloat16, seed=s) for s in (0, 1))
    weight = random_tensor(100, dtype=torch.bfloat16, seed=2)
    expected, total = reference.add_rms_norm(x.clone(), residual.clone(), weight, EPS)
    x, residual = strided(x, device), strided(residual, device)
    normed, updated = add_rms_norm(x, residual, weight.to(device), EPS, out=x)
    assert normed is x
    assert updated is residual
    assert_near(normed, expected)
    assert torch.equal(residual.cpu(), total)
    assert_near(rms_norm(residual, weight.to(device), EPS, out=residual), expected)


def norms_take_a_weight_for_each_row(device: torch.device) -> None:
    for width in (100, 576):
        x, residual, weight = (
            random_tensor(5, width, dtype=torch.bfloat16, seed=seed) for seed in range(3)
        )
        assert_near(
            rms_norm(x.to(device), strided(weight, device), EPS),
            reference.rms_norm(x, weight, EPS),
        )
        expected, _ = reference.add_rms_norm(x.clone(), residual.clone(), weight, EPS)
        out, _ = add_rms_norm(x.to(device), residual.to(device), weight.to(device), EPS)
        assert_near(out, expected)


def a_row_of_zeros_stays_zero(device: torch.device) -> None:
    x = torch.zeros(2, 64, dtype=torch.bfloat16, device=device)
    assert not rms_norm(x, torch.ones_like(x[0]), EPS).any()


def silu_mul_agrees(device: torch.device) -> None:
    for dtype in DTYPES:
        for width in (1536, 100, 3000):
            gate_up = random_tensor(3, 2 * width, dtype=dtype)
            expected = reference.silu_mul(gate_up)
            assert_near(silu_mul(gate_up.to(device)), expected)
            out = strided(torch.zeros(3, width, dtype=dtype), device)
            assert_near(silu_mul(strided(gate_up, device), out=out), expected)


def silu_mul_takes_extreme_gates(device: torch.device) -> None:
    gate = torch.tensor([-1e30, -200.0, -0.0, 0.0, 200.0, 1e30, torch.inf, torch.nan])
    gate_up = torch.cat((gate, torch.ones(8)))[None]
    expected = reference.silu_mul(gate_up)
    with np.errstate(over="ignore"):  # the interpreter's exp is numpy's
        out = silu_mul(gate_up.to(device)).cpu()
    assert torch.equal(out[0, 2:7], expected[0, 2:7])
    assert bool((out[0, :2].abs() < 1e-30).all())
    assert bool(out[0, 7].isnan())


class Rotation:
    """Random inputs of `rotate_and_store`, on the host, and what should come of them."""

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        heads: int = 9,
        kv_heads: int = 3,
        dim: int = 64,
        rot_dim: int | None = None,
        has_norm: bool = False,
        has_row_norms: bool = False,
        page_tokens: int = 16,
    ) -> None:
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        rot_dim = rot_dim or dim
        self.qkv = random_tensor(6, (heads + 2 * kv_heads) * dim, dtype=dtype)
        half = random_tensor(40, rot_dim // 2, dtype=torch.float32, seed=1)
        self.cos = torch.cat((half.cos(), half.cos()), dim=-1).to(dtype)
        self.sin = torch.cat((-half.sin(), half.sin()), dim=-1).to(dtype)
        self.positions = torch.tensor([0, 39, 7, 7, 20, 0], dtype=torch.int32)
        pages, offsets = torch.tensor([4, 1, 0, 2, 4, 0]), torch.tensor([0, 1, 2, 3, 4, 5])
        self.slots = (pages * page_tokens + offsets % page_tokens).to(torch.int32)
        self.slots[5] = -1
        self.kv = torch.full((5, 2, page_tokens, kv_heads, dim), torch.nan, dtype=dtype)
        shape = (6, dim) if has_row_norms else (dim,)
        self.norms = tuple(
            random_tensor(*shape, dtype=dtype, seed=s) if has_norm else None for s in (2, 3)
        )

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the queries and the pages."""
        heads = self.qkv.view(6, -1, self.dim)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.norms[0] is not None:
            weights = (norm.unsqueeze(-2) for norm in self.norms if norm is not None)
            q, k = (reference.rms_norm(x, w, EPS) for x, w in zip((q, k), weights, strict=True))
        cos, sin = (table[self.positions.long()].unsqueeze(1) for table in (self.cos, self.sin))
        q, k = (reference.rotate(x, cos, sin) for x in (q, k))
        kv = self.kv.clone()
        for row, slot in enumerate(self.slots[:5].tolist()):
            page, offset = divmod(slot, kv.shape[2])
            kv[page, :, offset] = torch.stack((k[row], v[row]))
        return q, kv

    def run(
        self, device: torch.device, *, is_strided: bool = False, is_in_place: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        qkv = strided(self.qkv, device) if is_strided else self.qkv.to(device).clone()
        kv = self.kv.to(device).clone()
        tables = (self.cos, self.sin, self.positions, self.slots)
        q_norm, k_norm = (None if norm is None else norm.to(device) for norm in self.norms)
        queries = qkv.unflatten(1, (-1, self.dim))[:, : self.heads]
        out = rotate_and_store(
            qkv,
            kv,
            *(table.to(device) for table in tables),
            q_norm=q_norm,
            k_norm=k_norm,
            eps=EPS,
            out=queries if is_in_place else None,
        )
        return out.cpu(), kv.cpu()


def assert_same(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """Compare bit by bit; NaN, which marks slots that must not be written, equals NaN.

    In float32 only to rounding: whether torch fuses product and sum depends on the machine, and
    only in half precision is the product exact either way.
    """
    for a, b in zip(got, expected, strict=True):
        atol = 4e-6 if a.dtype == torch.float32 else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=atol, equal_nan=True)


def rotation_agrees_bit_by_bit(device: torch.device) -> None:
    for dtype in DTYPES:
        for heads, kv_heads, dim, rot_dim in (
            (9, 3, 64, 64),
            (8, 1, 96, 96),
            (4, 4, 80, 32),
            (3, 1, 20, 10),
        ):
            case = Rotation(dtype=dtype, heads=heads, kv_heads=kv_heads, dim=dim, rot_dim=rot_dim)
            assert_same(case.run(device), case.expected())


def rotation_norms_each_head(device: torch.device) -> None:
    for dtype in DTYPES:
        for dim, rot_dim, has_row_norms in ((64, 64, False), (80, 32, False), (80, 32, True)):
            sizes = {"dim": dim, "rot_dim": rot_dim, "has_row_norms": has_row_norms}
            case = Rotation(dtype=dtype, has_norm=True, **sizes)
            (q, kv), (expected_q, expected_kv) = case.run(device), case.expected()
            written = ~expected_kv.isnan()
            assert torch.equal(~kv.isnan(), written)
            assert torch.equal(kv[:, 1].nan_to_num(), expected_kv[:, 1].nan_to_num())
            # A norm may differ by a unit, and a rotation adds two of them of any size.
            for got, expected in ((q, expected_q), (kv[written], expected_kv[written])):
                unit = torch.finfo(dtype).eps * float(expected.abs().max())
                assert float((got.float() - expected.float()).abs().max()) <= 4 * unit
                if dtype != torch.float32:
                    assert float((got != expected).float().mean()) < 0.02


def rotation_takes_strided_rows_and_works_in_place(device: torch.device) -> None:
    case = Rotation(dtype=torch.bfloat16)
    expected = case.expected()
    assert_same(case.run(device, is_strided=True), expected)
    assert_same(case.run(device, is_in_place=True), expected)
    assert_same(case.run(device, is_strided=True, is_in_place=True), expected)


def rotation_writes_pages_of_any_size(device: torch.device) -> None:
    for page_tokens in (1, 7, 32):
        case = Rotation(dtype=torch.float32, page_tokens=page_tokens)
        if page_tokens == 1:
            case.slots[4] = 3
        assert_same(case.run(device), case.expected())


def rotation_writes_pages_beyond_2_to_the_31_elements(device: torch.device) -> None:
    """4 GiB, of which a CPU maps only what is written."""
    case = Rotation(dtype=torch.bfloat16)
    _, expected = case.expected()
    written = ~expected.isnan()
    first = 2**31 // case.kv[0].numel() + 1
    kv = torch.empty(first + 5, *case.kv.shape[1:], dtype=case.kv.dtype, device=device)
    kv[first:] = torch.nan
    slots = torch.where(case.slots < 0, case.slots, case.slots + first * case.kv.shape[2])
    tables = (case.cos, case.sin, case.positions, slots)
    rotate_and_store(case.qkv.to(device), kv, *(table.to(device) for table in tables))
    far = kv[first:].cpu()
    assert torch.equal(~far.isnan(), written)
    assert torch.equal(far[written], expected[written])


def no_rows_launch_nothing(device: torch.device) -> None:
    empty = torch.empty(0, 64, device=device)
    weight = torch.ones(64, device=device)
    assert rms_norm(empty, weight, EPS).shape == (0, 64)
    assert silu_mul(empty).shape == (0, 32)
    indices = torch.empty(0, dtype=torch.int32, device=device)
    kv = torch.empty(1, 2, 16, 1, 16, device=device)
    table = torch.empty(1, 16, device=device)
    assert rotate_and_store(empty, kv, table, table, indices, indices).shape == (0, 2, 16)


ELEMENTWISE_CHECKS: list[tuple[str, Callable[[torch.device], None]]] = [
    (check.__name__, check)
    for check in (
        rms_norm_agrees,
        add_rms_norm_agrees_and_updates_the_residual,
        norms_take_strided_rows_and_write_where_told,
        norms_take_a_weight_for_each_row,
        a_row_of_zeros_stays_zero,
        silu_mul_agrees,
        silu_mul_takes_extreme_gates,
        rotation_agrees_bit_by_bit,
        rotation_norms_each_head,
        rotation_takes_strided_rows_and_works_in_place,
        rotation_writes_pages_of_any_size,
        rotation_writes_pages_beyond_2_to_the_31_elements,
        no_rows_launch_nothing,
    )
]
