"""The frozen messages between rank 0 and the other ranks of a replica, which are its children.

Work travels in the order in which rank 0 launched it, and each rank takes it up in that order.
Tensors never travel here: they are for the collectives.
"""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_scheduler.plan import Request
from loraplex_server.engine.loader import LoadResult
from loraplex_server.engine.messages import DiscardAdapter, PrefetchAdapter, Shutdown

# From rank 0 to the others.


@dataclass(frozen=True)
class JoinGroup:
    """Meet at the store that listens on this port of 127.0.0.1; sent once all have `Loaded`."""

    port: int


@dataclass(frozen=True)
class UseSizes:
    """What all ranks have room for, in the order in which it was asked for."""

    sizes: tuple[int, ...]


#: Of a sequence's step: request id, start, number of tokens, their ids, the block table, and
#: whether it is sampled, awaits a token and wants states. See `SequenceStep`.
StepRow = tuple[str, int, int, tuple[int, ...], tuple[int, ...], bool, bool, bool]


@dataclass(frozen=True)
class RunStep:
    """A plan, without what the plan before it told: see `plan_news`.

    Attributes:
        requests: those whose sequences were not in the plan before.
        specs: of adapters that were not, by id.
        rows: the sequences' steps.
        pages: of all adapters of the plan, by id.
    """

    requests: tuple[Request, ...]
    specs: dict[str, AdapterSpec]
    rows: tuple[StepRow, ...]
    pages: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class LoadPart:
    """Fill these pages with the rank's part of the adapter; each is answered by a `LoaderReport`.

    Sent behind the steps that may still use the pages.
    """

    adapter: AdapterManifest
    pages: tuple[int, ...]


Work = RunStep | LoadPart | PrefetchAdapter | DiscardAdapter | Shutdown
ToWorker = JoinGroup | UseSizes | Work


# From the others to rank 0.


@dataclass(frozen=True)
class Loaded:
    """The rank has its part of the model."""


@dataclass(frozen=True)
class Joining:
    """The rank is about to meet the others."""


@dataclass(frozen=True)
class Sized:
    """What the rank has room for."""

    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Serving:
    """The rank takes up work."""


@dataclass(frozen=True)
class LoaderReport:
    """What the rank's loader has done since the last one.

    Attributes:
        loads: that ended, in the order in which they were asked for.
        discarded: adapters that are in its host memory no more.
        host_bytes: of it that adapters take now.
    """

    loads: tuple[LoadResult, ...]
    discarded: tuple[str, ...]
    host_bytes: int


@dataclass(frozen=True)
class RankFailed:
    """The rank cannot go on; it exits after this."""

    message: str


FromWorker = Loaded | Joining | Sized | Serving | LoaderReport | RankFailed
