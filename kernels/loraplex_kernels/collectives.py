"""What the ranks of one replica tell each other, counted.

A sum over ranks is taken in the order of the ranks, element by element: each rank gets a share of
the elements from everybody, adds them up, and tells everybody. That sends the bytes of a ring, and
unlike in a ring, or in a library that chooses by size, an element's bits do not depend on where it
lies: a request's tokens stay the same in any company. Two ranks simply swap what they have.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.distributed as dist

#: What collectives are counted as: outputs of the base's linears, LoRA between its halves, the
#: embeddings, the logits, sampled tokens.
Kind = Literal["base", "lora", "embedding", "head", "tokens"]


@dataclass
class Traffic:
    """What one rank has sent so far, by the formulas of the algorithms; counted, not measured.

    Attributes:
        num_messages: collectives, by kind.
        num_bytes: bytes this rank sent, by kind.
    """

    num_messages: dict[Kind, int] = field(default_factory=dict)
    num_bytes: dict[Kind, int] = field(default_factory=dict)

    def count(self, kind: Kind, num_bytes: int, num_messages: int = 1) -> None:
        self.num_messages[kind] = self.num_messages.get(kind, 0) + num_messages
        self.num_bytes[kind] = self.num_bytes.get(kind, 0) + num_bytes


class Collectives(Protocol):
    """One rank's end; every rank makes the same calls in the same order, with equal shapes.

    Attributes:
        rank, num_ranks: which rank this is, and of how many.
        traffic: what it has sent.
    """

    @property
    def rank(self) -> int: ...

    @property
    def num_ranks(self) -> int: ...

    @property
    def traffic(self) -> Traffic: ...

    def all_reduce(self, x: torch.Tensor, kind: Kind = "base") -> None:
        """Replace contiguous `x` by its sum over the ranks: float32, then rounded once.

        Args:
            kind: what it is counted as.
        """

    def all_gather(self, x: torch.Tensor, kind: Kind = "base") -> torch.Tensor:
        """Return `x` of every rank, `[num_ranks, *x.shape]`."""

    def broadcast(self, x: torch.Tensor, kind: Kind = "tokens") -> None:
        """Replace `x` by that of rank 0."""


class TorchCollectives:
    """Implements `Collectives` over torch.distributed: NCCL, or gloo on a CPU."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank = group.rank()
        self._num_ranks = group.size()
        self._traffic = Traffic()

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def num_ranks(self) -> int:
        return self._num_ranks

    @property
    def traffic(self) -> Traffic:
        return self._traffic

    def all_reduce(self, x: torch.Tensor, kind: Kind = "base") -> None:
        if self._num_ranks == 2:  # as many bytes as the two exchanges, and one launch less
            x.copy_(_sum_in_order(self.all_gather(x, kind)))
        elif self._num_ranks > 2:
            self._all_reduce_by_shares(x, kind)

    def _all_reduce_by_shares(self, x: torch.Tensor, kind: Kind) -> None:
        num_ranks, flat = self._num_ranks, x.view(-1)
        if not len(flat):
            return
        share = -(-len(flat) // num_ranks)
        if share * num_ranks != len(flat):
            flat = torch.nn.functional.pad(flat, (0, share * num_ranks - len(flat)))
        mine = torch.empty_like(flat)
        self._swap(mine, flat)
        self._gather(mine, _sum_in_order(mine.view(num_ranks, share)).to(x.dtype))
        x.view(-1).copy_(mine[: x.numel()])
        self._traffic.count(kind, 2 * (num_ranks - 1) * share * x.element_size(), 2)

    def all_gather(self, x: torch.Tensor, kind: Kind = "base") -> torch.Tensor:
        gathered = x.new_empty((self._num_ranks, *x.shape))
        if not x.numel():
            return gathered
        self._gather(gathered.view(-1), x.contiguous().view(-1))
        self._traffic.count(kind, (self._num_ranks - 1) * x.numel() * x.element_size())
        return gathered

    def broadcast(self, x: torch.Tensor, kind: Kind = "tokens") -> None:
        if self._num_ranks > 1:
            self._send(x)
            num_receivers = self._num_ranks - 1 if self._rank == 0 else 0
            self._traffic.count(kind, num_receivers * x.numel() * x.element_size())

    # ---- what torch.distributed does -----------------------------------------------------------

    def _swap(self, into: torch.Tensor, x: torch.Tensor) -> None:
        """Send share `i` of flat `x` to rank `i`; its share of ours becomes `into`'s `i`."""
        dist.all_to_all_single(into, x, group=self._group)

    def _gather(self, into: torch.Tensor, x: torch.Tensor) -> None:
        """Fill flat `into` with the flat `x` of every rank."""
        _all_gather(into, x, group=self._group)

    def _send(self, x: torch.Tensor) -> None:
        """Replace `x` by that of rank 0."""
        dist.broadcast(x, group_src=0, group=self._group)


def _sum_in_order(shares: torch.Tensor) -> torch.Tensor:
    """Return the float32 sum of `[ranks, ...]` in their order, whatever `sum` would do."""
    total = shares[0].float()
    for share in shares[1:]:
        total = total + share.float()
    return total


#: Newer releases of torch have it under another name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def join_group(
    rank: int,
    num_ranks: int,
    store: dist.Store,  # type: ignore[name-defined]
    device: torch.device,
    timeout_s: float,
) -> TorchCollectives:
    """Join the ranks that meet at `store`; returns when all are there.

    Args:
        timeout_s: how long any collective may take before it fails.

    Raises:
        RuntimeError: some did not come in time.
    """
    try:
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=num_ranks,
            timeout=datetime.timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
    except Exception:
        # torch names groups by their number, this one counted, and the ranks of the next one, of
        # which the others are new processes, meet by that name.
        dist.distributed_c10d._world.group_count = 0
        raise
    group = dist.group.WORLD
    assert group is not None, "it was made just now"
    return TorchCollectives(group)
