"""A workload: who asks for what, when. Arrays of numbers; no tokens, no clock.

A request follows its conversation's previous turn (`follows`) or nobody. A first turn arrives at
`arrival_s`; a later one arrives `arrival_s` seconds after the answer to the turn before has ended,
and its prompt is that turn's prompt, its answer, and `prompt_len` tokens more.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

#: `adapter` of requests to the base model, `follows` of first turns.
NOBODY = -1


@dataclass(frozen=True)
class Trace:
    """One workload. All arrays have one entry per request, first turns in order of arrival.

    Attributes:
        arrival_s: seconds from the start, or after the end of the turn before.
        adapter: index of the adapter in 0 .. num_adapters - 1, or NOBODY for the base model.
        prompt_len: tokens of the prompt that are this request's own, at least 1.
        output_len: tokens to generate, exactly.
        num_adapters: adapters that exist, used or not.
        rate: requests per second that were asked for (all turns).
        duration_s: the span over which arrivals were drawn.
        tenant: index of the tenant; all 0 by default.
        follows: index of the turn before, or NOBODY.
        shared_len: tokens at the start of a first turn's prompt that all requests of the same
            adapter share (a system prompt), beside `prompt_len`.
    """

    name: str
    arrival_s: Floats
    adapter: Ints
    prompt_len: Ints
    output_len: Ints
    num_adapters: int
    rate: float
    duration_s: float
    tenant: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    follows: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    shared_len: int = 0

    def __post_init__(self) -> None:
        num = len(self.arrival_s)
        if not len(self.tenant):
            object.__setattr__(self, "tenant", np.zeros(num, np.int64))
        if not len(self.follows):
            object.__setattr__(self, "follows", np.full(num, NOBODY, np.int64))
        arrays = (self.adapter, self.prompt_len, self.output_len, self.tenant, self.follows)
        if any(len(array) != num for array in arrays):
            raise ValueError("every array of a trace needs one entry per request")
        if num and (self.prompt_len.min() < 1 or self.output_len.min() < 1):
            raise ValueError("a request has at least one token of prompt and of answer")
        if num and not NOBODY <= self.adapter.min() <= self.adapter.max() < self.num_adapters:
            raise ValueError(f"an adapter is not among the {self.num_adapters} of the trace")
        if (self.follows >= np.arange(num)).any():
            raise ValueError("a turn must stand after the one that it follows")
        if (np.diff(self.arrival_s[self.follows == NOBODY]) < 0).any():
            raise ValueError("first turns must stand in the order of their arrival")

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def num_tenants(self) -> int:
        return int(self.tenant.max()) + 1 if len(self) else 0
