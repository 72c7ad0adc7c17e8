"""How many numbers the ranks exchange between the halves of LoRA, and where each of them lies then.

A step on its own sends what its adapters have. A recorded one is replayed for any adapters, and a
recorded collective sends as much each time: so it sends what has room for `RECORDED_RANK` rank rows
of every token row, and only which of them are read is in tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from loraplex_kernels.batch import LoRABatch
from loraplex_kernels.lora_planes import PlaneLayout, gather_order
from loraplex_kernels.lora_work import layer_classes
from loraplex_kernels.model_tables import LoRASite
from loraplex_kernels.plane_places import IntArray
from loraplex_kernels.static_tables import copy_tables

#: Rank rows of a module for which recorded steps have room, on average over a step's token rows.
#: Every recorded step sends as many: 16 KB from each of two devices for 64 rows of gate and up.
RECORDED_RANK: Final = 64


@dataclass(frozen=True)
class ExchangeTables:
    """What one rank's halves of a step need to know, on the device.

    Attributes:
        classes: class of each layer; layers of a class exchange alike.
        num_sent: `[classes][sites]`, float32 elements that the shrink hands over.
        orders: `[classes][sites]`, int32: see `lora_planes.gather_order`; empty where the site is
            row-parallel and its planes are summed as they lie.
    """

    classes: Sequence[int]
    num_sent: Sequence[Sequence[int]]
    orders: Sequence[Sequence[torch.Tensor]]


@dataclass(frozen=True)
class ExchangeWork:
    """`ExchangeTables` as the host lays them out."""

    classes: tuple[int, ...]
    num_sent: tuple[tuple[int, ...], ...]
    orders: tuple[tuple[IntArray, ...], ...]

    def to(self, device: torch.device) -> ExchangeTables:
        """Copy the orders to `device` in one transfer."""
        width = len(self.orders[0])
        tensors = copy_tables([order for orders in self.orders for order in orders], device)
        orders = [tensors[i : i + width] for i in range(0, len(tensors), width)]
        return ExchangeTables(self.classes, self.num_sent, orders)


def build_exchange(batch: LoRABatch, sites: Sequence[LoRASite], num_ranks: int) -> ExchangeWork:
    """Lay out what a step exchanges if it is computed on its own.

    Args:
        batch: the step, in host memory; its adapters are cut over ranks.
        sites: of a layer, in the order of their `index`.
        num_ranks: how many exchange.
    """
    class_of_layer, members = layer_classes([batch.ranks.numpy()])
    num_sent, orders = [], []
    for layer in members:
        planes = [_SitePlanes.of(batch, layer, site) for site in sites]
        num_sent.append(tuple(site.sent.num_elems for site in planes))
        orders.append(tuple(site.order(num_ranks) for site in planes))
    return ExchangeWork(tuple(class_of_layer.tolist()), tuple(num_sent), tuple(orders))


def recorded_sizes(sites: Sequence[LoRASite], num_ranks: int, num_rows: int) -> list[int]:
    """Return the elements that a recorded step of `num_rows` sends at each site."""
    own_rank = -(-RECORDED_RANK // num_ranks)
    ranks = (RECORDED_RANK if site.is_row_parallel else own_rank for site in sites)
    return [
        num_rows * len(site.projections) * rank for site, rank in zip(sites, ranks, strict=True)
    ]


def order_elems(site: LoRASite, num_rows: int) -> int:
    """Return the length of the order of a recorded step: that of the whole planes."""
    return 0 if site.is_row_parallel else num_rows * len(site.projections) * RECORDED_RANK


def recorded_orders(
    batch: LoRABatch, sites: Sequence[LoRASite], num_ranks: int, num_rows: int
) -> list[IntArray] | None:
    """Return the orders with which a recorded step of `num_rows` computes this one.

    None where it cannot: the adapters are too large for what it sends, or their layers differ, of
    which it has but one order.
    """
    _, members = layer_classes([batch.ranks.numpy()])
    if len(members) > 1:
        return None
    orders = []
    for site, size in zip(sites, recorded_sizes(sites, num_ranks, num_rows), strict=True):
        planes, length = _SitePlanes.of(batch, members[0], site), order_elems(site, num_rows)
        num_read = 0 if site.is_row_parallel else planes.read.num_elems
        if planes.sent.num_elems > size or num_read > length:
            return None
        order = np.zeros(length, dtype=np.int32)  # what is behind the step's own is not read
        order[:num_read] = planes.order(num_ranks, pitch=size)
        orders.append(order)
    return orders


@dataclass(frozen=True)
class _SitePlanes:
    """The planes of one site of one layer: as sent, and as the expand reads them."""

    site: LoRASite
    seg_indptr: IntArray
    ranks: IntArray
    cut_ranks: IntArray
    sent: PlaneLayout
    read: PlaneLayout

    @classmethod
    def of(cls, batch: LoRABatch, layer: int, site: LoRASite) -> _SitePlanes:
        assert batch.a_ranks is not None, "the adapters are cut over ranks"
        modules, seg_indptr = list(site.projections), batch.seg_indptr.numpy()
        ranks, cut_ranks = (t[layer].numpy()[:, modules] for t in (batch.ranks, batch.a_ranks))
        sent, read = (PlaneLayout.of(seg_indptr, r) for r in (cut_ranks, ranks))
        return cls(site, seg_indptr, ranks, cut_ranks, sent, read)

    def order(self, num_ranks: int, pitch: int | None = None) -> IntArray:
        if self.site.is_row_parallel:
            return np.zeros(0, dtype=np.int32)
        order = gather_order(self.seg_indptr, self.ranks, self.cut_ranks, num_ranks, pitch)
        return order.astype(np.int32)
