"""All routing policies by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from loraplex_server.simulator.routing.affine import (
    BoundedLoad,
    ConsistentHash,
    ModuloHash,
    TwoChoices,
)
from loraplex_server.simulator.routing.gateway import GatewayPicker
from loraplex_server.simulator.routing.popularity import PopularityPlacement
from loraplex_server.simulator.routing.preferences import HashRing, Rendezvous
from loraplex_server.simulator.routing.router import Router
from loraplex_server.simulator.routing.spread import LeastLoaded, Random, RoundRobin

#: Each makes a router for so many replicas and a seed.
ROUTERS: Final[dict[str, Callable[[int, int], Router]]] = {
    "random": lambda num, seed: Random(seed),
    "round-robin": lambda num, seed: RoundRobin(),
    "least-loaded": lambda num, seed: LeastLoaded(),
    "modulo": lambda num, seed: ModuloHash(),
    "consistent": lambda num, seed: ConsistentHash(HashRing(num)),
    "bounded": lambda num, seed: BoundedLoad(HashRing(num)),
    # As the files for HAProxy and Envoy that are shipped.
    "bounded-150": lambda num, seed: BoundedLoad(HashRing(num), bound=1.5),
    "two-choices": lambda num, seed: TwoChoices(HashRing(num)),
    "gateway": lambda num, seed: GatewayPicker(seed=seed),
    "gateway-lora": lambda num, seed: GatewayPicker(lora_weight=3.0, queue_weight=1.0, seed=seed),
    "popularity": lambda num, seed: PopularityPlacement(HashRing(num)),
    "affine": lambda num, seed: BoundedLoad(Rendezvous(num)),
}


def make_router(name: str, num_replicas: int, seed: int) -> Router:
    """Return a new router; KeyError for a name that is not in `ROUTERS`."""
    return ROUTERS[name](num_replicas, seed)
