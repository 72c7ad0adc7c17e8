"""How long a step takes on a device: the larger of its arithmetic and its memory traffic.

    step = overhead + inefficiency x max(FLOPs / peak, bytes / bandwidth)

FLOPs: two per weight and token in the linears, two per weight and sampled row in the output layer,
4 x heads x head_dim per layer for each pair of a token and one it attends to; adapters add less
than 2 % to them and are left out. Bytes: all weights once, K and V of every token attended to, K
and V written, and adapters: once per distinct adapter of the step, or once per row, as S-LoRA's
decode kernel gathers them.
"""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_memory.layout import PoolLayout
from loraplex_scheduler.step_times import StepLoad
from loraplex_server.simulator.hardware import Hardware
from loraplex_server.simulator.models import ELEM_BYTES, SimulatedModel


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step computes, exactly.

    Attributes:
        num_tokens: rows computed.
        num_sampled: rows that pass the output layer.
        kv_tokens: tokens whose K and V are read, over all sequences.
        attended: pairs of a computed token and one that it attends to.
        adapter_pages: pages of adapters read from memory.
    """

    num_tokens: int
    num_sampled: int
    kv_tokens: int
    attended: float
    adapter_pages: int


@dataclass(frozen=True)
class Inefficiency:
    """How an engine falls short of the device's limits.

    Attributes:
        factor: multiplies the roofline's time of a step, and of a load.
        overhead_s: host work and launches of a step, which nothing hides.
    """

    factor: float = 1.0
    overhead_s: float = 0.0


class Roofline:
    """Times of one model on one device; immutable. A `StepTimes` and `RestoreCosts`, too."""

    def __init__(
        self,
        model: SimulatedModel,
        hardware: Hardware,
        layout: PoolLayout,
        inefficiency: Inefficiency,
    ) -> None:
        geometry = model.geometry
        self._factor = inefficiency.factor
        self._overhead_s = inefficiency.overhead_s
        self._s_per_flop = 1 / hardware.flops
        self._s_per_byte = 1 / hardware.bandwidth
        self._link_s_per_byte = 1 / hardware.host_link
        self._token_flops = 2.0 * model.layer_params
        self._head_flops = 2.0 * model.head_params
        self._pair_flops = 4.0 * geometry.num_layers * geometry.num_heads * geometry.head_dim
        self._read_bytes = float(ELEM_BYTES * (model.layer_params + model.head_params))
        self._kv_bytes = float(model.kv_bytes)
        self._page_bytes = float(layout.page_bytes(ELEM_BYTES))
        self._page_tokens = layout.page_tokens

    def compute_s(self, work: StepWork) -> float:
        """Return the time the arithmetic needs at the device's peak."""
        flops = work.num_tokens * self._token_flops + work.num_sampled * self._head_flops
        flops += work.attended * self._pair_flops
        return flops * self._s_per_flop

    def traffic_s(self, work: StepWork) -> float:
        """Return the time the memory traffic needs at the device's bandwidth."""
        num_bytes = self._read_bytes + (work.kv_tokens + work.num_tokens) * self._kv_bytes
        return (num_bytes + work.adapter_pages * self._page_bytes) * self._s_per_byte

    def work_s(self, work: StepWork) -> float:
        """Return how long the step takes."""
        at_best = max(self.compute_s(work), self.traffic_s(work))
        return self._overhead_s + self._factor * at_best

    # ---- what policies ask -------------------------------------------------------------------

    def step_s(self, load: StepLoad) -> float:
        """Predict the time of a step whose tokens attend to an average context each."""
        mean_context = load.kv_tokens / max(1, load.num_sequences)
        return self.work_s(
            StepWork(
                num_tokens=load.num_tokens,
                num_sampled=load.num_sequences,
                kv_tokens=load.kv_tokens,
                attended=load.num_tokens * mean_context,
                adapter_pages=load.adapter_pages,
            )
        )

    def observe_step(self, load: StepLoad, took_s: float) -> None:
        """Learn nothing: the model is exact."""

    def adapter_s(self, num_pages: int) -> float:
        """Return the time to copy so many pages from host memory."""
        return self._factor * num_pages * self._page_bytes * self._link_s_per_byte

    def observe_load(self, num_pages: int, took_s: float) -> None:
        """Learn nothing: the model is exact."""

    def prefix_page_s(self) -> float:
        """Return the time to compute a page of a prompt again, in a step that computes anyway."""
        return self._factor * self._page_tokens * self._token_flops * self._s_per_flop
