"""Timing on a device: graphs, interleaved arms, medians; on a CPU only to try scripts out.

What is timed is recorded as a CUDA graph first, so that neither Python nor the driver's launch cost
is in the number, for ours and for the others alike. Arms take turns, A-B-A-B, so that clocks and
neighbours hurt them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Work = Callable[[], object]

#: Bytes to rotate through so that a run never finds its data in the cache (60 MB on an H200).
COLD_BYTES = 192 << 20


class DeviceClock:
    """Times work on one device.

    Args:
        device: a CUDA device, or the CPU for a dry run, where times mean nothing.
        rounds: how often each arm is timed.
    """

    def __init__(self, device: torch.device, rounds: int = 7) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        self._rounds = rounds if self.is_cuda else 1

    def record(self, calls: Sequence[Work]) -> Work:
        """Return a function that does all calls again, in order, as one graph."""
        if not self.is_cuda:
            return lambda: [call() for call in calls]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Compiles kernels and takes libraries' workspaces, which a capture must not do.
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def time_ms(self, work: Work) -> float:
        """Return milliseconds of one run, with nothing else on the device."""
        if not self.is_cuda:
            started = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - started)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)

    def compare_us(self, arms: Mapping[str, Sequence[Work]]) -> dict[str, float]:
        """Return the median microseconds of one call of each arm, the arms taking turns.

        Args:
            arms: the calls of each arm, over different data each so that together they outgrow the
                cache. The median is over rounds, of the mean over an arm's calls.
        """
        replays = {name: self.record(calls) for name, calls in arms.items()}
        for replay in replays.values():
            replay()
        times: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(self._rounds):
            for name, replay in replays.items():
                times[name].append(self.time_ms(replay))
        return {
            name: 1e3 * statistics.median(values) / len(arms[name])
            for name, values in times.items()
        }


def num_copies(bytes_each: int, *, most: int) -> int:
    """Return how many copies of a working set outgrow the cache, at least 2 and at most `most`."""
    return max(2, min(most, -(-COLD_BYTES // max(1, bytes_each))))
