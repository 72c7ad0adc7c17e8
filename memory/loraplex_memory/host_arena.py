"""Host memory for packed adapters: one slab, pinned where a GPU copies out of it.

One host page is the slice of one pool page over all layers: one long contiguous copy, 2 MB on an
8B model. So an adapter is read and packed once, and crosses again for the price of the copy.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from loraplex_memory.host_pages import HostPages
from loraplex_memory.host_tier import HostTier
from loraplex_memory.layout import PoolLayout
from loraplex_memory.pool import zeros


class HostArena:
    """Filled and copied from by one thread, the loader's; any other may ask, and discard.

    A lock guards the accounts. It is held for look-ups only, never while bytes move: pinned, an
    adapter keeps its pages meanwhile.

    Memory is committed when pages are first written, except where it is pinned: that takes all of
    it at once, and a second or so for every few GiB.

    Args:
        layout: the pool's.
        num_pages: of host memory.
        dtype: the pool's.
        is_pinned: register the memory with the GPU's driver, so that copies out of it run beside
            the host and at full speed.

    Raises:
        MemoryError: so much memory cannot be had, or not be pinned.
    """

    def __init__(
        self, layout: PoolLayout, num_pages: int, *, dtype: torch.dtype, is_pinned: bool = False
    ) -> None:
        shape = (num_pages, layout.geometry.num_layers, layout.page_elems)
        self._slab = zeros(shape, dtype, torch.device("cpu"))
        self._tier = HostTier(num_pages)
        self._lock = threading.Lock()
        self.num_pages = num_pages
        self.page_bytes = layout.page_bytes(dtype.itemsize)
        self._is_pinned = is_pinned and num_pages > 0
        if self._is_pinned:
            _pin(self._slab)

    def __contains__(self, adapter_id: str) -> bool:
        """Tell whether an adapter is here, or being filled in."""
        with self._lock:
            return adapter_id in self._tier

    def adapter_ids(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._tier)

    def bytes_of(self, adapter_id: str) -> int:
        """Return what an adapter takes; 0 when it is not here."""
        with self._lock:
            return self._tier.num_pages_of(adapter_id) * self.page_bytes

    @property
    def capacity_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return self._tier.num_used_pages * self.page_bytes

    @property
    def num_hits(self) -> int:
        """How often `hold` found the adapter here."""
        with self._lock:
            return self._tier.num_hits

    @contextmanager
    def hold(
        self, adapter_id: str, num_pages: int, now_s: float, fill: Callable[[HostPages], None]
    ) -> Iterator[HostPages | None]:
        """Keep an adapter here for the length of the block, and after it until others need room.

        Args:
            adapter_id: counts as used now.
            num_pages: how many it takes.
            now_s: seconds, on any one clock that does not go back.
            fill: writes it into the pages it is given, called if it is not here yet. If that
                fails, the pages are free again and the error is the caller's.

        Yields:
            Its pages; None if it does not fit.
        """
        with self._lock:
            pages = self._tier.lookup(adapter_id, now_s)
            is_filled = pages is not None
            if pages is None:
                pages = self._tier.reserve(adapter_id, num_pages, now_s)
            if pages is not None:
                self._tier.pin(adapter_id)
        if pages is None:
            yield None
            return
        held = HostPages(self._slab, pages)
        try:
            if not is_filled:
                fill(held)
                is_filled = True
            yield held
        finally:
            with self._lock:
                self._tier.unpin(adapter_id)
                if not is_filled:
                    self._tier.drop(adapter_id)

    def discard(self, adapter_id: str) -> None:
        """Give an adapter's pages back: now, or when nobody holds it."""
        with self._lock:
            self._tier.drop(adapter_id)

    def check(self) -> None:
        """Raise AssertionError if an invariant of the accounts is broken."""
        with self._lock:
            self._tier.check()

    def close(self) -> None:
        """Unpin the memory; nothing may be copied out of it any more."""
        if self._is_pinned:
            self._is_pinned = False
            _unpin(self._slab)


def _pin(slab: torch.Tensor) -> None:
    # Not `pin_memory=True`: torch's allocator rounds up to a power of two, gigabytes here.
    num_bytes = math.prod(slab.shape) * slab.element_size()
    status = int(torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), num_bytes, 0))  # type: ignore[no-untyped-call]
    if status != 0:
        raise MemoryError(
            f"{num_bytes} bytes of host memory cannot be pinned (CUDA error {status}): "
            "lower host_bytes"
        )


def _unpin(slab: torch.Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(slab.data_ptr())  # type: ignore[no-untyped-call]
