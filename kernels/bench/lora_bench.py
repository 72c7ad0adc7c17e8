"""LoRA sites on a device: ours against the baselines and against the bytes that must move.

In decode a site is bound by the bytes of the adapters, read once per adapter and step, and where
they are few by the two launches. True bytes are A and B of every distinct adapter at its own rank;
inputs, outputs and what is between the launches are not counted, for anyone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from baseline_site import Site
from baselines import BASELINES, PaddedSlots
from device_clock import DeviceClock, Work, num_copies
from device_limits import DeviceLimits

from loraplex_kernels.batch import (
    LoRABatch,
    PagedAdapter,
    build_attention_batch,
    build_lora_batch,
)
from loraplex_kernels.model_tables import KernelModel, LoRASite, StepCapacity
from loraplex_kernels.ops import device_backend
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_memory.layout import PROJECTIONS, SITES, ModelGeometry, PoolLayout
from loraplex_memory.layout import Site as SiteName

#: S-LoRA's mixes (arXiv 2311.03285, table 2), handed out in turn, and single ranks.
RANK_MIXES = {
    "8": (8,),
    "16": (16,),
    "32": (32,),
    "64": (64,),
    "S1": (8,),
    "S2": (64, 32, 16, 8),
}


@dataclass(frozen=True)
class LoRACase:
    """One site with `num_rows` decode rows spread evenly over `num_adapters`."""

    model: str
    geometry: ModelGeometry
    site: SiteName
    num_adapters: int
    num_rows: int
    mix: str

    @property
    def name(self) -> str:
        return (
            f"{self.model} {self.site} {self.num_adapters} adapters {self.num_rows} rows "
            f"ranks {self.mix}"
        )

    @property
    def ranks(self) -> list[int]:
        mix = RANK_MIXES[self.mix]
        return [mix[i % len(mix)] for i in range(self.num_adapters)]

    @property
    def true_bytes(self) -> int:
        """bfloat16 bytes of A and B of every adapter."""
        g = self.geometry
        per_rank = sum(g.in_features(p) + g.out_features(p) for p in SITES[self.site])
        return 2 * per_rank * sum(self.ranks)


@dataclass(frozen=True)
class LoRAResult:
    """Microseconds of each arm, and what they mean.

    Attributes:
        us: median of one call, by arm; "ours" is one of them.
        gb_s: true bytes over our time.
        bandwidth_share: that as a share of the copy bandwidth.
        padded_bytes: what padded slots read instead of the true bytes.
    """

    case: str
    true_bytes: int
    padded_bytes: int
    us: dict[str, float]
    gb_s: float
    bandwidth_share: float

    def ratio(self, arm: str) -> float | None:
        """How many times longer another arm takes."""
        return self.us[arm] / self.us["ours"] if arm in self.us else None


class LoRABench:
    """Adapters of one case on the device, in as many copies as it takes to outgrow the cache."""

    def __init__(self, case: LoRACase, clock: DeviceClock, dtype: torch.dtype) -> None:
        self._case = case
        self._clock = clock
        self._layout = PoolLayout(case.geometry)
        # Copies are layers of the pool: the pages mean other bytes in each.
        self._num_copies = num_copies(case.true_bytes, most=256) if clock.is_cuda else 1
        adapters, num_pages = self._place_adapters()
        generator = torch.Generator(clock.device).manual_seed(0)
        shape = (self._num_copies, num_pages, self._layout.page_elems)
        # Small, so that thousands of deltas added to one output stay finite.
        self._pool = torch.empty(shape, dtype=dtype, device=clock.device)
        self._pool.normal_(0, 1e-3, generator=generator)
        self._host_batch = self._make_batch(adapters)
        g = case.geometry
        self._widths = tuple(g.out_features(p) for p in SITES[case.site])
        self._in_features = g.in_features(SITES[case.site][0])
        rows = case.num_rows
        self._x = torch.randn(rows, self._in_features, device=clock.device).to(dtype)
        self._y = torch.randn(rows, sum(self._widths), device=clock.device).to(dtype)

    def run(self, limits: DeviceLimits, baselines: Sequence[str]) -> LoRAResult:
        """Check our result against the padded one, then time all arms in turn."""
        arms = {"ours": self._our_calls()}
        padded_bytes = 0
        for name in baselines:
            arms[name], weight_bytes = self._baseline_calls(name)
            padded_bytes = weight_bytes or padded_bytes
        self._compare_results(arms)
        us = self._clock.compare_us(arms)
        gb_s = self._case.true_bytes / us["ours"] / 1e3
        return LoRAResult(
            self._case.name,
            self._case.true_bytes,
            padded_bytes,
            us,
            gb_s,
            gb_s / limits.copy_gb_s,
        )

    def _place_adapters(self) -> tuple[list[PagedAdapter], int]:
        """Give each adapter pages scattered over the pool."""
        num_projections = len(PROJECTIONS)
        site = {PROJECTIONS.index(p) for p in SITES[self._case.site]}
        layouts = []
        for rank in self._case.ranks:
            row = tuple(rank if p in site else 0 for p in range(num_projections))
            one_layer = ModelGeometry(**{**vars(self._case.geometry), "num_layers": 1})
            pool = PoolLayout(one_layer, self._layout.page_tokens)
            layouts.append(AdapterLayout(pool, AdapterSpec((row,))))
        num_pages = sum(layout.num_pages for layout in layouts)
        free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(1)).tolist()
        adapters = []
        for layout in layouts:
            pages = [free.pop() for _ in range(layout.num_pages)]
            tables = (
                list(table) * self._num_copies
                for table in (layout.ranks, layout.a_chunks, layout.b_chunks)
            )
            adapters.append(PagedAdapter(pages, *tables))
        return adapters, num_pages

    def _make_batch(self, adapters: list[PagedAdapter]) -> LoRABatch:
        """Rows of different adapters lie mixed, as they do in a batch of requests."""
        rows = [list(range(g, self._case.num_rows, len(adapters))) for g in range(len(adapters))]
        batch = build_lora_batch(adapters, rows, self._layout.chunk_elems)
        assert batch is not None
        return batch

    def _our_calls(self) -> list[Work]:
        case, g = self._case, self._case.geometry
        site = LoRASite(
            index=0,
            projections=tuple(PROJECTIONS.index(p) for p in SITES[case.site]),
            in_features=self._in_features,
            out_features=self._widths,
        )
        model = KernelModel(
            num_layers=self._num_copies,
            num_heads=g.num_heads,
            num_kv_heads=g.num_kv_heads,
            head_dim=g.head_dim,
            page_tokens=self._layout.page_tokens,
            page_elems=self._layout.page_elems,
            chunk_elems=self._layout.chunk_elems,
            sites=(site,),
            dtype=self._pool.dtype,
        )
        rows = case.num_rows
        backend = device_backend(model, StepCapacity(rows, rows, rows), self._clock.device)
        attention = build_attention_batch([(0, 1)] * rows, [[0]] * rows, self._layout.page_tokens)
        ops = backend.prepare(attention, self._host_batch)

        def call(layer: int) -> Work:
            return lambda: ops.add_lora(self._y, self._x, self._pool[layer], layer=layer, site=site)

        return [call(layer) for layer in range(self._num_copies)]

    def _baseline_calls(self, name: str) -> tuple[list[Work], int]:
        """Return the calls, and the bytes that padded slots read."""
        batch = _to(self._host_batch, self._clock.device)
        projections = tuple(PROJECTIONS.index(p) for p in SITES[self._case.site])
        calls: list[Work] = []
        weight_bytes = 0
        for layer in range(self._num_copies):
            site = Site(
                self._pool[layer], batch, layer, projections, self._in_features, self._widths
            )
            baseline = BASELINES[name](site)
            calls.append(lambda baseline=baseline: baseline(self._y, self._x))
            if isinstance(baseline, PaddedSlots):
                weight_bytes = baseline.weight_bytes
        return calls, weight_bytes

    def _compare_results(self, arms: dict[str, list[Work]]) -> None:
        """Raise AssertionError where a baseline computes another delta than ours does."""
        deltas = {}
        for name, calls in arms.items():
            self._y.zero_()
            calls[0]()
            deltas[name] = self._y.float()
        self._y.normal_()
        ours = deltas["ours"]
        for name, delta in deltas.items():
            error = float((delta - ours).norm() / ours.norm())
            assert error < 2e-2, f"{self._case.name}: {name} differs from ours by {error}"


def _to(batch: LoRABatch, device: torch.device) -> LoRABatch:
    tensors = {
        name: value.to(device)
        for name, value in vars(batch).items()
        if isinstance(value, torch.Tensor)
    }
    return LoRABatch(**{**vars(batch), **tensors})


def bandwidth_cases(model: str, geometry: ModelGeometry, num_adapters: int) -> Iterator[LoRACase]:
    """Every site with as many adapters as rows: the bytes decide."""
    for mix in ("S2", "16", "64", "8", "32"):
        for site in SITES:
            yield LoRACase(model, geometry, site, num_adapters, num_adapters, mix)


def sharing_cases(model: str, geometry: ModelGeometry) -> Iterator[LoRACase]:
    """The qkv site from one row on one adapter to 256 rows on 64: launches and sharing decide."""
    for mix in ("S2", "16"):
        for num_adapters in (4, 1, 16, 64):
            for num_rows in (64, 1, 4, 16, 256):
                if num_rows >= num_adapters and (num_rows, num_adapters) != (64, 64):
                    yield LoRACase(model, geometry, "qkv", num_adapters, num_rows, mix)
