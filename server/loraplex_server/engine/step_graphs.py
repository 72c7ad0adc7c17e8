"""Decode steps as recorded graphs, one per number of rows, with and without LoRA.

Between a recording and its replays nothing may change but the contents of tensors: what differs
from step to step is in tables that the recorded kernels read (decision record 8).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any, Protocol

import torch

Replay = Callable[[], None]


class GraphRecorder(Protocol):
    """Turns a function that enqueues work into one that enqueues the same work again."""

    def record(self, run: Replay) -> Replay: ...


class CudaGraphRecorder:
    """Records CUDA graphs; all of them share one pool of memory, as none runs beside another.

    Args:
        is_watched: a thread of NCCL's asks the device how far collectives are, which must not
            spoil a capture. Never tried on several GPUs, for want of them.
    """

    def __init__(self, *, is_watched: bool = False) -> None:
        self._memory: Any = None
        self._errors = "thread_local" if is_watched else "global"

    def record(self, run: Replay) -> Replay:
        """Run once eagerly, then capture.

        The eager run compiles kernels, lets libraries take their workspaces and NCCL connect the
        ranks, which a capture must not do.
        """
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode=self._errors):
            run()
        self._memory = graph.pool()
        return graph.replay


class DirectRecorder:
    """Where there are no graphs: a replay calls the function, over the same tables."""

    def record(self, run: Replay) -> Replay:
        return run


def graph_sizes(max_rows: int) -> tuple[int, ...]:
    """Return the numbers of rows that get a graph; a step takes the next larger one."""
    sizes = {size for size in (1, 2, 4) if size < max_rows} | set(range(8, max_rows, 8))
    return (*sorted(sizes), max_rows)


class StepGraphs:
    """Owned by the runner. `run(num_rows, has_lora)` enqueues one decode step."""

    def __init__(
        self, run: Callable[[int, bool], None], max_rows: int, recorder: GraphRecorder
    ) -> None:
        self._run = run
        self._sizes = graph_sizes(max_rows)
        self._recorder = recorder
        self._replays: dict[tuple[int, bool], Replay] = {}

    def record_all(self) -> None:
        """Record every size, the largest first: the smaller ones fit into its memory."""
        for num_rows in reversed(self._sizes):
            for has_lora in (True, False):
                self._replays[num_rows, has_lora] = self._recorder.record(
                    self._bound(num_rows, has_lora)
                )

    def padded(self, num_rows: int) -> int:
        """Return how many rows the graph for `num_rows` computes."""
        return self._sizes[bisect_left(self._sizes, num_rows)]

    def replay(self, num_rows: int, has_lora: bool) -> None:
        """Enqueue a decode step of `num_rows`, a value of `padded`."""
        self._replays[num_rows, has_lora]()

    def forget(self) -> None:
        """Give the recordings up, and with them what they hold of collectives."""
        self._replays.clear()

    def _bound(self, num_rows: int, has_lora: bool) -> Replay:
        return lambda: self._run(num_rows, has_lora)
