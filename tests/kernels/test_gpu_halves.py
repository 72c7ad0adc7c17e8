"""LoRA on several GPUs, under the interpreter: `half_checks`, and all that lies between halves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraplex_kernels import reference
from loraplex_kernels.lora_exchange import RECORDED_RANK
from loraplex_kernels.ops import device_backend
from loraplex_memory.layout import SITES
from loraplex_memory.partition import Partition
from loraplex_server.model.transformer import kernel_model, lora_site
from tests.support.half_checks import (
    CAPACITY,
    EIGHT,
    HALF_CHECKS,
    NUM_TOKENS,
    RAGGED,
    ROWS,
    decodes,
    halves_of,
    make_backend,
)
from tests.support.interpreted import _one_launch_at_a_time  # noqa: F401  (a fixture)
from tests.support.kernel_cases import SMALL, make_lora_case
from tests.support.ranks import join_threads, run_ranks


def make_cases(num_ranks, ranks, rows=ROWS, **options):
    return [
        make_lora_case(ranks, rows, num_ranks=num_ranks, rank=rank, **options)
        for rank in range(num_ranks)
    ]


@pytest.mark.parametrize(
    "check", [check for _, check in HALF_CHECKS], ids=[name for name, _ in HALF_CHECKS]
)
def test_halves(check):
    check(torch.device("cpu"))


@pytest.mark.parametrize("is_recorded", [False, True], ids=["eager", "recorded"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_together_add_what_one_adds(one_launch_at_a_time, num_ranks, is_recorded):
    cases = make_cases(num_ranks, [EIGHT, [RAGGED[0]] * 2, EIGHT], geometry=SMALL)
    whole = make_lora_case([EIGHT, [RAGGED[0]] * 2, EIGHT], ROWS, geometry=SMALL)
    groups = join_threads(num_ranks)
    attention, layout = decodes(16), cases[0].pool.layout
    x = torch.randn(NUM_TOKENS, SMALL.hidden_size)
    mixed = torch.randn(NUM_TOKENS, SMALL.num_heads * SMALL.head_dim)

    def add(rank):
        case, group = cases[rank], groups[rank]
        backend = device_backend(kernel_model(case.pool), CAPACITY, torch.device("cpu"), group)
        if is_recorded:
            assert backend.fill(attention, case.batch, 12)
            ops = backend.static_ops(12, has_lora=True)
        else:
            ops = backend.prepare(attention, case.batch)
        outputs = []
        for name, own in (("gate_up", x), ("o", _columns(mixed, layout, rank))):
            site = lora_site(name, layout.partition)
            width = SMALL.hidden_size if site.is_row_parallel else sum(site.out_features)
            y = torch.zeros(NUM_TOKENS, width)
            ops.add_lora(y, own, case.pool.layer(1), layer=1, site=site)
            if site.is_row_parallel:
                group.all_reduce(y)
            outputs.append(y)
        return outputs

    parts = run_ranks(num_ranks, add)
    for name, own, index in (("gate_up", x, 0), ("o", mixed, 1)):
        site = lora_site(name, Partition(SMALL, 1))
        expected = torch.zeros(NUM_TOKENS, sum(site.out_features))
        reference.add_lora(
            expected,
            own,
            whole.pool.layer(1),
            whole.batch,
            layer=1,
            projections=site.projections,
            out_features=site.out_features,
        )
        mine = [part[index] for part in parts]
        joined = mine[0] if name == "o" else _join_modules(mine, site)
        torch.testing.assert_close(joined, expected, atol=2e-4, rtol=1e-4)


def _columns(x, layout, rank):
    """Return a rank's inputs of the output projection, padded."""
    cut = layout.partition.inputs("o", rank)
    own = x[:, cut.start : cut.stop]
    return torch.nn.functional.pad(own, (0, cut.padding))


def _join_modules(parts, site):
    """Return gate and up of all ranks, without what the last one is padded with."""
    halves = [part.chunk(2, dim=1) for part in parts]
    width = site.out_features[0]
    return torch.cat([torch.cat([h[i] for h in halves], 1)[:, :width] for i in (0, 1)], 1)


def test_a_row_is_bit_identical_in_any_company():
    outcomes = []
    for rows in ([[4]], [[0, 4]], [list(range(8)), [8]]):
        case = make_lora_case([RAGGED, EIGHT][: len(rows)], rows, geometry=SMALL, num_ranks=2)
        site = lora_site("qkv", case.pool.layout.partition)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(NUM_TOKENS, site.in_features, generator=generator)
        planes = halves_of(case).shrink(x, case.pool.layer(0), layer=0, site=site)
        width = int(case.batch.a_ranks[0, 0, :3].sum())
        at = rows[0].index(4) * width
        outcomes.append(planes[at : at + width])
    assert all(torch.equal(outcomes[0], other) for other in outcomes[1:])


def test_a_recorded_step_exchanges_the_same_whatever_its_adapters_are():
    sent = []
    for ranks in ([EIGHT], [[[64] * 7] * 2]):
        case = make_lora_case(ranks, [[0, 1]], geometry=SMALL, num_ranks=2)
        backend = make_backend(case)
        assert backend.fill(decodes(16, 2), case.batch, 4)
        (halves,) = backend.static_ops(4, has_lora=True).lora_halves
        sizes = []
        for name in SITES:
            site = lora_site(name, case.pool.layout.partition)
            x = torch.randn(4, site.in_features)
            planes = halves.shrink(x, case.pool.layer(0), layer=0, site=site)
            order = halves.gather_order(layer=0, site=site, num_ranks=2)
            sizes.append((len(planes), len(order)))
            assert not len(order) or int(order.max()) < 2 * len(planes)
        sent.append(sizes)
    assert sent[0] == sent[1]
    assert sent[0][0] == (4 * 3 * RECORDED_RANK // 2, 4 * 3 * RECORDED_RANK)


def test_a_step_that_exchanges_more_than_was_recorded_is_computed_on_its_own():
    def fits(ranks, rows, num_rows=4, **changes):
        case = make_lora_case(ranks, rows, geometry=SMALL, num_ranks=2)
        batch = replace(case.batch, **changes)
        return make_backend(case).fill(decodes(16, sum(map(len, rows))), batch, num_rows)

    large = [[RECORDED_RANK + 1] * 7] * 2
    assert fits([EIGHT, large], [[0, 1], [2]])
    assert not fits([large], [[0, 1, 2, 3]])
    assert fits([large], [[0, 1, 2]])  # padding rows have room too
    assert not fits([RAGGED], [[0]]), "of layers that differ"
    assert not fits([EIGHT], [[0]], weights=torch.tensor([0.5]))
