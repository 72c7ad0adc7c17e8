"""Products of thin matrices, written with no more ranks than they have."""

from __future__ import annotations

import pytest
import torch

from loraplex_server.adapters.folds.recompress import recompress


def matrices(rank: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, 40, generator=generator), torch.randn(24, rank, generator=generator)


@pytest.mark.parametrize("rank", [1, 7, 24, 31])
def test_the_product_stays_and_its_rank_is_the_least(rank: int):
    a, b = matrices(rank)
    thin_a, thin_b = recompress(a, b)
    assert thin_a.shape == (min(rank, 24), 40)
    assert thin_b.shape == (24, min(rank, 24))
    torch.testing.assert_close(thin_b @ thin_a, b @ a, atol=1e-4, rtol=1e-5)


def test_terms_that_cancel_leave_their_difference_alone():
    a, b = matrices(8)
    a0, b0 = a + 1e-4 * matrices(8, seed=1)[0], b.clone()
    joined_a, joined_b = torch.cat((a0, a)), torch.cat((b0, -b), dim=1)
    expected = joined_b.double() @ joined_a.double()
    thin_a, thin_b = recompress(joined_a, joined_b)
    rounded = thin_b.bfloat16().double() @ thin_a.bfloat16().double()
    assert (rounded - expected).norm() < 0.01 * expected.norm()
    naive = joined_b.bfloat16().double() @ joined_a.bfloat16().double()
    assert (naive - expected).norm() > 3 * expected.norm()


def test_nothing_is_one_rank_of_zeros():
    thin_a, thin_b = recompress(torch.zeros(4, 40), torch.zeros(24, 4))
    assert thin_a.shape == (1, 40)
    assert not (thin_b @ thin_a).any()


def test_no_ranks_are_one_rank_of_zeros_too():
    thin_a, thin_b = recompress(torch.zeros(0, 40), torch.zeros(24, 0))
    assert (thin_a.shape, thin_b.shape) == ((1, 40), (24, 1))
    assert not (thin_b @ thin_a).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_stays_none_for_the_reader_to_refuse(bad: float):
    a, b = matrices(7)
    b[3, 2] = bad
    thin_a, thin_b = recompress(a, b)
    assert thin_a.isfinite().all()
    assert not thin_b.isfinite().all()
