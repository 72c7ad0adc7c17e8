"""Sums and gathers over ranks: exact, counted, and the same wherever an element lies."""

from __future__ import annotations

import pytest
import torch

from tests.support.ranks import join_threads, run_ranks


def sums(num_ranks, operands):
    """Return what rank 0 has after an all-reduce of `operands` `[ranks, n]`, and its traffic."""
    ends = join_threads(num_ranks)
    shares = [operand.clone() for operand in operands]
    run_ranks(num_ranks, lambda rank: ends[rank].all_reduce(shares[rank]))
    assert all(torch.equal(share, shares[0]) for share in shares)
    return shares[0], ends[0].traffic


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_is_taken_in_the_order_of_the_ranks(num_ranks, dtype):
    operands = torch.randn(num_ranks, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = operands[0].float()
    for operand in operands[1:]:
        expected = expected + operand.float()
    assert torch.equal(sums(num_ranks, operands)[0], expected.to(dtype))


def test_an_elements_bits_do_not_depend_on_its_place():
    """What a row becomes may not depend on which rows are in the batch with it."""
    operands = torch.randn(4, 1001, generator=torch.Generator().manual_seed(1))
    whole, _ = sums(4, operands)
    for start, stop in ((0, 1), (7, 20), (333, 1001)):
        assert torch.equal(sums(4, operands[:, start:stop])[0], whole[start:stop])


def test_bytes_are_those_of_a_ring():
    _, traffic = sums(4, torch.zeros(4, 64))
    assert traffic.num_bytes == {"base": 2 * 3 * 64 // 4 * 4}
    assert traffic.num_messages == {"base": 2}


def test_a_gather_is_by_rank():
    ends = join_threads(3)
    gathered = run_ranks(3, lambda rank: ends[rank].all_gather(torch.full((2, 2), float(rank))))
    expected = torch.arange(3.0)[:, None, None].expand(3, 2, 2)
    assert all(torch.equal(each, expected) for each in gathered)
    assert ends[1].traffic.num_bytes == {"base": 2 * 4 * 4}


def test_nothing_is_sent_where_there_is_nothing():
    ends = join_threads(2)
    empty = torch.zeros(0)
    run_ranks(2, lambda rank: (ends[rank].all_reduce(empty), ends[rank].all_gather(empty)))
    assert ends[0].traffic.num_messages == {}


def test_a_broadcast_is_the_first_ranks():
    ends = join_threads(2)
    tokens = [torch.tensor([5, 6]), torch.tensor([0, 0])]
    run_ranks(2, lambda rank: ends[rank].broadcast(tokens[rank]))
    assert tokens[1].tolist() == [5, 6]
