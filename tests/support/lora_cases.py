"""Batches, activations and launches for the checks of the LoRA kernels; imports no pytest."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from loraplex_kernels import reference
from loraplex_kernels.batch import LoRABatch
from loraplex_kernels.lora_launch import add_lora
from loraplex_kernels.lora_shape import LoRAShape, LoRATuning
from loraplex_kernels.lora_work import (
    LoRATables,
    LoRAWork,
)
from loraplex_memory.layout import SITES, PoolLayout
from loraplex_server.model.transformer import lora_site
from tests.support.kernel_cases import LoRACase

Rows = list[list[int]]

#: K of the small geometries in several parts, as real sizes have it.
SHORT_PARTS = LoRATuning(part_elems=64)
SERIAL = replace(SHORT_PARTS, serial_rows=1)

MIXED = [[8, 0, 3, 16, 1, 64, 200], [200, 8, 0, 0, 5, 0, 7]]

RANKS: dict[str, list[list[list[int]]]] = {
    **{f"rank {r}": [[[r] * 7] * 2] for r in (1, 8, 16, 64, 0)},
    "rank 200": [[[200] * 7] * 2, *[[[12] * 7] * 2] * 2],
    "mixed ranks": [MIXED, [[16] * 7] * 2, [[1, 64, 0, 8, 2, 2, 33]] * 2, [[0] * 7] * 2],
}


def _draw_rows(weights: Sequence[float], num_rows: int) -> Rows:
    """Spread token rows `0, 2, 4, ...` over adapters by popularity; each gets one at least."""
    generator = random.Random(1)
    owners = list(range(len(weights)))
    owners += generator.choices(range(len(weights)), weights, k=num_rows - len(weights))
    tokens = generator.sample(range(0, 2 * num_rows, 2), num_rows)
    return [[t for t, o in zip(tokens, owners, strict=True) if o == g] for g in range(len(weights))]


POPULARITY: dict[str, Rows] = {
    "identical": [list(range(1, 20))],
    "distinct": [[7], [0], [3], [2], [9]],
    "uniform": _draw_rows([1] * 4, 14),
    "zipf": _draw_rows([1 / (g + 1) for g in range(5)], 18),
    "skewed": [list(range(17, 0, -1)), [20], [23, 22]],
    "one row": [[5]],
    "ragged prefill": [list(range(3, 22)), [0], [31, 30]],
}


@dataclass(frozen=True)
class Launcher:
    """Runs the kernels on copies of host tensors."""

    device: torch.device
    num_programs: int = 3

    def run(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        pool: torch.Tensor,
        work: LoRAWork | LoRATables,
        shape: LoRAShape,
        layer: int = 0,
    ) -> torch.Tensor:
        """Return `y` with LoRA added; both activations have NaN between their rows."""
        tables = work.to(self.device) if isinstance(work, LoRAWork) else work
        tables.planes.fill_(torch.nan)
        wide_y, wide_x = self._strided(y), self._strided(x)
        add_lora(
            wide_y,
            wide_x,
            pool.to(self.device),
            tables,
            layer=layer,
            shape=shape,
            num_programs=self.num_programs,
        )
        parent = wide_y._base
        assert parent is not None
        assert parent[:, y.shape[1] :].isnan().all(), "the gap between rows was written"
        return wide_y.cpu()

    def _strided(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 1:  # token ids
            return tensor.to(self.device)
        rows, width = tensor.shape
        wide = torch.full((rows, width + 16), torch.nan, dtype=tensor.dtype, device=self.device)
        wide[:, :width] = tensor.to(self.device)
        return wide[:, :width]


def site_shapes(layout: PoolLayout, tuning: LoRATuning = SHORT_PARTS) -> list[LoRAShape]:
    return [
        LoRAShape.of(
            lora_site(site, layout.partition),
            chunk_elems=layout.chunk_elems,
            page_elems=layout.page_elems,
            tuning=tuning,
        )
        for site in SITES
    ]


def make_activations(
    shape: LoRAShape, rows: Rows, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `y` and `x`; rows of `x` that have no adapter are NaN."""
    num_tokens = max((row for segment in rows for row in segment), default=0) + 2
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((num_tokens, shape.in_features), torch.nan)
    used = sorted(row for segment in rows for row in segment)
    x[used] = torch.randn(len(used), shape.in_features, generator=generator)
    y = torch.randn(num_tokens, sum(shape.out_features), generator=generator)
    return y.to(dtype), x.to(dtype)


def assert_agrees(out: torch.Tensor, expected: torch.Tensor, before: torch.Tensor) -> None:
    """Compare with the reference, and untouched elements bit by bit."""
    untouched = expected == before
    assert torch.equal(out[untouched.all(1)], before[untouched.all(1)])
    # Half types: the kernel rounds the rank vector, the reference does not.
    slack = {torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}[out.dtype]
    torch.testing.assert_close(out.float(), expected.float(), rtol=slack / 4, atol=slack)


def check_site(
    launcher: Launcher, case: LoRACase, rows: Rows, shape: LoRAShape, layer: int, work: LoRAWork
) -> None:
    y, x = make_activations(shape, rows, case.pool.dtype)
    expected = y.clone()
    assert case.batch is not None
    reference_site(expected, x, case.pool.layer(layer), case.batch, shape, layer)
    out = launcher.run(y, x, case.pool.layer(layer), work, shape, layer)
    assert_agrees(out, expected, y)


def reference_site(
    y: torch.Tensor,
    x: torch.Tensor,
    pool: torch.Tensor,
    batch: LoRABatch,
    shape: LoRAShape,
    layer: int = 0,
) -> None:
    reference.add_lora(
        y,
        x,
        pool,
        batch,
        layer=layer,
        projections=shape.modules,
        out_features=shape.out_features,
    )


def spread(name: str, num_adapters: int) -> list[list[list[int]]]:
    """Return ranks for each adapter of a batch."""
    choices = RANKS[name]
    return [choices[g % len(choices)] for g in range(num_adapters)]
