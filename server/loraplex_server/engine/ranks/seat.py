"""What building one rank's part of an engine asks of the other ranks."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any, Final, Protocol

import torch
import torch.distributed as dist

from loraplex_kernels.collectives import Collectives, TorchCollectives, join_group
from loraplex_server.engine.errors import EngineConfigError

#: How long one step, one collective or one load may take before a rank is taken to hang. A step of
#: a large model on a few cores takes tens of seconds.
RANK_TIMEOUT_S: Final = 120.0

#: Ranks are processes of one machine.
_HOST: Final = "127.0.0.1"


class Seat(Protocol):
    """One rank's place among the others; all ranks make the same calls in the same order.

    Attributes:
        rank, num_ranks: which rank this is, and of how many.
    """

    @property
    def rank(self) -> int: ...

    @property
    def num_ranks(self) -> int: ...

    def join(self, device: torch.device) -> Collectives | None:
        """Wait until all ranks have loaded their parts, and meet them; None of a rank alone."""

    def agree(self, *sizes: int) -> tuple[int, ...]:
        """Return, for each size, the least that any rank says."""


class Alone:
    """Implements `Seat`: an engine of one process."""

    rank: Final = 0
    num_ranks: Final = 1

    def join(self, device: torch.device) -> None:
        del device

    def agree(self, *sizes: int) -> tuple[int, ...]:
        return sizes


class Meeting:
    """A store of torch.distributed where the ranks of one replica find each other.

    It is there as long as rank 0 holds it.
    """

    def __init__(self, store: Any, port: int) -> None:
        self._store = store
        self.port: Final = port

    @classmethod
    def call(cls) -> Meeting:
        """Return a new one on a free port. Left alone, it would listen on all addresses."""
        listener = socket.create_server((_HOST, 0))
        port: int = listener.getsockname()[1]
        return cls(
            dist.TCPStore(  # type: ignore[attr-defined]
                _HOST,
                port,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            ),
            port,
        )

    @classmethod
    def find(cls, port: int) -> Meeting:
        """Return the one that rank 0 has called."""
        store = dist.TCPStore(  # type: ignore[attr-defined]
            _HOST, port, is_master=False, wait_for_workers=False
        )
        return cls(store, port)

    def join(
        self,
        device: torch.device,
        *,
        rank: int,
        num_ranks: int,
        timeout_s: float = RANK_TIMEOUT_S,
    ) -> TorchCollectives:
        """Return this rank's end once all have come.

        Args:
            timeout_s: how long that may take, and then each collective.

        Raises:
            EngineConfigError: this process is a rank of another engine; torch knows one at a time.
            RuntimeError: some did not come in time.
        """
        if dist.is_initialized():
            raise EngineConfigError(
                "this process has an engine with tensor_parallel already: close that one first"
            )
        if device.type == "cpu":
            loopback = "lo0" if sys.platform == "darwin" else "lo"
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        return join_group(rank, num_ranks, self._store, device, timeout_s)


def part(timeout_s: float) -> bool:
    """Leave the group that this process has joined, when no graph holds a collective of it.

    Returns:
        Whether that was done in time.
    """
    group = dist.group.WORLD
    assert group is not None, "it was joined"
    # Destroying an NCCL group waits for the other ranks, which have ended: it is aborted.
    is_nccl = dist.get_backend(group) == "nccl"
    leave = dist.distributed_c10d._abort_process_group if is_nccl else dist.destroy_process_group
    leaving = threading.Thread(target=leave, daemon=True, name="rank-parting")
    leaving.start()
    leaving.join(timeout_s)
    return not leaving.is_alive()


def least(sizes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the least of each column."""
    return tuple(map(min, zip(*sizes, strict=True)))
