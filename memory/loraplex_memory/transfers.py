"""From host memory into pages, beside the steps.

The loader's thread writes; a load counts as finished when `write` has returned, so no plan names
the adapter before its bytes are in place. On a GPU the host launches steps ahead of the device, so
the pages of an adapter may still be read by a step that was launched before they changed hands.
Therefore a load is given a **fence**, taken when it is submitted, and its copies wait for it on
their own stream; neither the compute stream nor the engine's thread ever waits for a load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Final, Protocol

import torch

from loraplex_memory.host_pages import HostPages
from loraplex_memory.pool import PagePool
from loraplex_memory.scratch import Scratch

#: Everything launched before it was taken; None where launching is computing.
Fence = torch.cuda.Event | None

#: `scatter(staging, pages, pool)`: `pool[l, pages[i]] = staging[i, l]` for staging `[N, L,
#: page_elems]`, pages int64 `[N]` and pool `[L, P, page_elems]`, enqueued on the current stream.
Scatter = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]

#: Room for a rank-16 adapter on every linear of an 8B model (84 MB) in one piece.
DEFAULT_STAGING_BYTES: Final = 128 << 20


class PoolWriter(Protocol):
    """Puts packed adapters into the pool; `fence` is for the engine's thread, the rest is not."""

    def fence(self) -> Fence:
        """Mark what was launched so far; what comes later may not use the pages to be written."""

    def buffer(self, num_pages: int) -> HostPages:
        """Return host memory for an adapter that has no place in the host arena.

        Its contents are anything; the next call may return the same memory.
        """

    def write(self, pages: Sequence[int], packed: HostPages, *, after: Fence) -> None:
        """Copy a packed adapter into as many pages of the pool; done on return."""


class DirectWriter:
    """Where the pool is in host memory: the copy is made at once."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._scratch = Scratch()

    def fence(self) -> Fence:
        return None

    def buffer(self, num_pages: int) -> HostPages:
        slab = self._scratch.take(_slab_shape(self._pool, num_pages), self._pool.dtype)
        return HostPages(slab, range(num_pages))

    def write(self, pages: Sequence[int], packed: HostPages, *, after: Fence) -> None:
        assert len(pages) == len(packed)
        for first, piece in packed.runs():
            self._pool.write(pages[first : first + len(piece)], piece.transpose(0, 1))


class Streams(Protocol):
    """The compute stream and a stream beside it."""

    def fence(self) -> Fence:
        """Mark what the calling thread has launched so far."""

    def copying(self, after: Fence) -> AbstractContextManager[None]:
        """Enqueue what the block enqueues beside the steps and behind the fence; done at its end.

        Waits even if the block fails: what it had enqueued by then still uses its memory.
        """


class CudaStreams:
    """Implements `Streams`; one copy stream of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def fence(self) -> Fence:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    @contextmanager
    def copying(self, after: Fence) -> Iterator[None]:
        # Which device and stream are current is a thread's own affair: set here, in the loader's.
        with torch.cuda.device(self._device), torch.cuda.stream(self._copies):
            if after is not None:
                self._copies.wait_event(after)
            try:
                yield
            finally:
                # Sleeps until then, as the engine needs the processor.
                done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                done.record(self._copies)
                done.synchronize()


class StreamWriter:
    """Owned by the loader; one `write` at a time, and no two buffers in use at once.

    An adapter is packed in pinned memory, where pages that lie side by side cross in one copy to a
    staging buffer on the device. From there `scatter` moves them to their places: a copy per page
    and layer would be thousands of small ones. What does not fit into the staging buffer crosses
    in several rounds. An adapter larger than the host buffer is packed in pageable memory.

    Args:
        pool: where the pages are.
        scatter: the kernel that moves staged pages.
        staging_bytes: size of the buffer on the device, and of the pinned one on the host.
        streams: the device's, unless a test says otherwise.
    """

    def __init__(
        self,
        pool: PagePool,
        scatter: Scatter,
        *,
        staging_bytes: int = DEFAULT_STAGING_BYTES,
        streams: Streams | None = None,
    ) -> None:
        self._pool = pool
        self._scatter = scatter
        self._streams = streams or CudaStreams(pool.device)
        shape = _slab_shape(pool, max(1, staging_bytes // pool.page_bytes))
        self._staging = torch.empty(shape, dtype=pool.dtype, device=pool.device)
        self._host = torch.empty(shape, dtype=pool.dtype, pin_memory=pool.device.type == "cuda")

    def fence(self) -> Fence:
        return self._streams.fence()

    def buffer(self, num_pages: int) -> HostPages:
        slab = self._host
        if num_pages > len(slab):
            slab = torch.empty(_slab_shape(self._pool, num_pages), dtype=self._pool.dtype)
        return HostPages(slab, range(num_pages))

    def write(self, pages: Sequence[int], packed: HostPages, *, after: Fence) -> None:
        assert len(pages) == len(packed)
        assert packed.slab.dtype == self._pool.dtype
        with self._streams.copying(after):
            index = torch.tensor(pages, dtype=torch.int64).to(self._pool.device, non_blocking=True)
            # One stream: a round is staged when the one before has been scattered.
            for first in range(0, len(pages), len(self._staging)):
                stop = min(first + len(self._staging), len(pages))
                for start, piece in packed.part(first, stop).runs():
                    self._staging[start : start + len(piece)].copy_(piece, non_blocking=True)
                self._scatter(self._staging[: stop - first], index[first:stop], self._pool.data)


def _slab_shape(pool: PagePool, num_pages: int) -> tuple[int, int, int]:
    return num_pages, pool.data.shape[0], pool.layout.page_elems
