"""Checks of LoRA's halves on one of several devices against their reference; imports no pytest.

One device is enough: whatever ranks exchange is handed over from one to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from loraplex_kernels import reference
from loraplex_kernels.batch import AttentionBatch, build_attention_batch
from loraplex_kernels.gpu import GpuBackend
from loraplex_kernels.gpu_halves import GpuLoRAHalves
from loraplex_kernels.model_tables import StepCapacity
from loraplex_memory.layout import ModelGeometry
from loraplex_server.model.transformer import kernel_model, lora_site
from tests.support.kernel_cases import ODD, SMALL, SMOLLM2, LoRACase, make_lora_case

RAGGED = [[5, 0, 3, 16, 1, 33, 7], [8, 8, 0, 0, 5, 0, 7]]
EIGHT = [[8] * 7] * 2
ROWS = [[4, 1, 2], [0], [7, 6]]
NUM_TOKENS = 9
CAPACITY = StepCapacity(max_tokens=96, max_sequences=16, max_pages=96)


def decodes(page_tokens: int, num_tokens: int = NUM_TOKENS) -> AttentionBatch:
    return build_attention_batch([(3, 1)] * num_tokens, [[0]] * num_tokens, page_tokens)


def make_backend(case: LoRACase, device: torch.device | None = None) -> GpuBackend:
    return GpuBackend(kernel_model(case.pool), CAPACITY, device or torch.device("cpu"))


def halves_of(case: LoRACase, device: torch.device | None = None) -> GpuLoRAHalves:
    """Return the halves of a step that is computed on its own."""
    attention = decodes(case.pool.layout.page_tokens)
    (halves,) = make_backend(case, device).prepare(attention, case.batch).lora_halves
    return halves


def each_half_agrees_with_the_reference(
    device: torch.device, geometry: ModelGeometry, num_ranks: int, dtype: torch.dtype
) -> None:
    """Of the last rank, whose part may be padded; outputs are columns of a wider matrix."""
    adapters, rank = [RAGGED, EIGHT, RAGGED], num_ranks - 1
    case = make_lora_case(
        adapters, ROWS, geometry=geometry, dtype=dtype, num_ranks=num_ranks, rank=rank
    )
    batch, pages, halves = case.batch, case.pool.layer(0), halves_of(case, device)
    assert batch is not None
    slack = 2e-4 if dtype is torch.float32 else 4e-2
    for name in ("qkv", "o"):
        site = lora_site(name, case.pool.layout.partition)
        projections, widths = site.projections, site.out_features
        x = torch.randn(NUM_TOKENS, site.in_features).to(dtype)
        expected = reference.shrink(x, pages, batch, layer=0, projections=projections)
        planes = halves.shrink(x.to(device), pages.to(device), layer=0, site=site)
        torch.testing.assert_close(planes.cpu(), expected, atol=slack / 4, rtol=slack / 4)
        ranks = batch.ranks[0][:, list(projections)].sum(1).tolist()
        whole = torch.randn(sum(r * len(rows) for r, rows in zip(ranks, ROWS, strict=True)))
        whole = whole.to(dtype).float()  # as tensor cores take it
        right = torch.randn(NUM_TOKENS, sum(widths)).to(dtype)
        wide = torch.nn.functional.pad(right, (20, 20), value=torch.nan).to(device)
        own = wide[:, 20:-20]
        halves.expand(own, whole.to(device), pages.to(device), layer=0, site=site)
        reference.expand(
            right, whole, pages, batch, layer=0, projections=projections, out_features=widths
        )
        torch.testing.assert_close(own.cpu().float(), right.float(), atol=slack, rtol=slack)
        assert wide[:, :20].isnan().all()
        assert wide[:, -20:].isnan().all()


def recorded_steps_give_the_bits_of_eager_ones(device: torch.device) -> None:
    """Two ranks in turn; what the recorded step sends has room for more than the adapters have."""
    num_ranks, adapters = 2, [EIGHT, [RAGGED[0]] * 2, EIGHT]
    cases = [
        make_lora_case(adapters, ROWS, geometry=SMALL, num_ranks=num_ranks, rank=rank)
        for rank in range(num_ranks)
    ]
    pages = [case.pool.layer(1).to(device) for case in cases]
    outputs = []
    for is_recorded in (False, True):
        halves = [_halves(case, device, is_recorded=is_recorded) for case in cases]
        for name in ("qkv", "down"):
            site = lora_site(name, cases[0].pool.layout.partition)
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(NUM_TOKENS, site.in_features, generator=generator).to(device)
            args = {"layer": 1, "site": site}
            planes = torch.stack(
                [own.shrink(x, part, **args) for own, part in zip(halves, pages, strict=True)]
            )
            if site.is_row_parallel:
                whole = planes[0] + planes[1]
            else:
                order = halves[0].gather_order(**args, num_ranks=num_ranks)
                whole = planes.view(-1).index_select(0, order)
            y = torch.zeros(NUM_TOKENS, sum(site.out_features), device=device)
            halves[0].expand(y, whole, pages[0], **args)
            assert y.count_nonzero() > 0
            outputs.append(y)
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


def _halves(case: LoRACase, device: torch.device, *, is_recorded: bool) -> GpuLoRAHalves:
    if not is_recorded:
        return halves_of(case, device)
    backend = make_backend(case, device)
    assert backend.fill(decodes(case.pool.layout.page_tokens), case.batch, 12)
    (halves,) = backend.static_ops(12, has_lora=True).lora_halves
    return halves


#: Chunks of 16 elements, as short as tiles can be, and of 10 and 2: no tiles.
_CUTS = {
    "of a padded model": (SMALL, 2),
    "of SmolLM2 on four": (SMOLLM2, 4),
    "of odd sizes on two": (ODD, 2),
    "of odd sizes on three": (ODD, 3),
}

HALF_CHECKS: list[tuple[str, Callable[[torch.device], None]]] = [
    *(
        (
            f"halves {name}, {str(dtype).removeprefix('torch.')}",
            partial(
                each_half_agrees_with_the_reference,
                geometry=geometry,
                num_ranks=num_ranks,
                dtype=dtype,
            ),
        )
        for name, (geometry, num_ranks) in _CUTS.items()
        for dtype in (torch.float32, torch.bfloat16)
    ),
    ("recorded steps of two ranks", recorded_steps_give_the_bits_of_eager_ones),
]
