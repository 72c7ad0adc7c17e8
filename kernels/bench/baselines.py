"""What others do, written here from its description, for an honest side by side.

Each baseline gets its weights in the layout it wants, and its index tables, before the clock
starts: only the work of a step is timed, as for our kernels.
"""

from __future__ import annotations

import torch
from baseline_site import Baseline, Site
from bgmv_triton import PerTokenBgmv
from padded_slots_triton import PaddedSlots

__all__ = ["BASELINES", "AdapterLoop", "Baseline", "GatherBmm", "PaddedSlots", "PerTokenBgmv"]


class AdapterLoop:
    """Two matrix products per adapter and projection: what a loop over PEFT models does.

    Reads each adapter's bytes once, in `2 * adapters * projections` small launches and more.
    """

    def __init__(self, site: Site) -> None:
        rows, columns = site.segments(), site.columns
        self._modules = [
            (
                _as_slice(rows[g]),
                slice(columns[s], columns[s] + site.out_features[s]),
                a.T.contiguous().T,
                b.contiguous(),
            )
            for g, s, a, b in site.matrices()
        ]

    def __call__(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add the delta to `y` in place."""
        for rows, columns, a, b in self._modules:
            y[rows, columns] += (x[rows] @ a.T) @ b


def _as_slice(rows: torch.Tensor) -> slice | torch.Tensor:
    """Rows without gaps as a slice, which spares the gather and the scatter."""
    first, last = int(rows[0]), int(rows[-1])
    is_run = bool((rows == torch.arange(first, first + len(rows), device=rows.device)).all())
    return slice(first, last + 1) if is_run else rows


class GatherBmm:
    """Gather the weights of each row's adapter, then two batched products (Punica's baseline).

    Moves the padded weights once per row to gather, and once per row to multiply.
    """

    def __init__(self, site: Site) -> None:
        num_adapters, rank = site.batch.num_segments, site.max_rank()
        pool, widths = site.pool_layer, site.out_features
        self._a = [pool.new_zeros(num_adapters, rank, site.in_features) for _ in widths]
        self._b = [pool.new_zeros(num_adapters, rank, width) for width in widths]
        for g, s, a, b in site.matrices():
            self._a[s][g, : len(a)] = a
            self._b[s][g, : len(b)] = b
        self._rows = site.batch.row_ids.long()
        self._adapters = site.row_segments().long()
        self._columns = site.columns

    def __call__(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add the delta to `y` in place."""
        x_rows = x[self._rows].unsqueeze(1)
        for column, a, b in zip(self._columns, self._a, self._b, strict=True):
            hidden = torch.bmm(x_rows, a[self._adapters].transpose(1, 2))
            delta = torch.bmm(hidden, b[self._adapters]).squeeze(1)
            y[:, column : column + b.shape[2]].index_add_(0, self._rows, delta)


BASELINES: dict[str, type[Baseline]] = {
    "adapter loop": AdapterLoop,
    "gather+bmm": GatherBmm,
    "per-token BGMV": PerTokenBgmv,
    "padded slots": PaddedSlots,
}
