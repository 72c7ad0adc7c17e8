"""The ranks of one replica as threads of one process: real gloo, real shards, one scheduler.

Each rank has its own weights, pool and runner. The first drives them: it tells every plan to the
others before it computes its own part, and packs every adapter for all of them.
"""

from __future__ import annotations

import datetime
import pickle
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from loraplex_kernels.collectives import TorchCollectives
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.file_packer import FilePacker
from loraplex_memory.layout import PoolLayout
from loraplex_memory.partition import Partition
from loraplex_memory.pool import PagePool
from loraplex_memory.transfers import DirectWriter
from loraplex_scheduler.limits import SchedulerLimits
from loraplex_scheduler.plan import AdapterLoad, Plan
from loraplex_scheduler.policies import PolicyChoice
from loraplex_server.build import assemble_core
from loraplex_server.engine.core import EngineCore
from loraplex_server.engine.ranks.plan_news import PlanHearer, PlanTeller
from loraplex_server.engine.runner import Flight, Runner, StepRunner
from loraplex_server.model.model_shard import ModelShard
from loraplex_server.model.spec import ModelSpec
from loraplex_server.model.transformer import Transformer
from loraplex_server.model.weights import fill_weights

_TIMEOUT = datetime.timedelta(seconds=240)


class ThreadCollectives(TorchCollectives):
    """Over a gloo group of its own: torch.distributed keeps one for a whole process."""

    def __init__(self, store: dist.Store, rank: int, num_ranks: int) -> None:
        group = dist.ProcessGroupGloo(store, rank, num_ranks, _TIMEOUT)
        super().__init__(group)
        self._gloo: Any = group

    def _swap(self, into: torch.Tensor, x: torch.Tensor) -> None:
        self._gloo.alltoall_base(into, x, [], []).wait()

    def _gather(self, into: torch.Tensor, x: torch.Tensor) -> None:
        self._gloo._allgather_base(into, x).wait()

    def _send(self, x: torch.Tensor) -> None:
        self._gloo.broadcast(x, 0).wait()


def join_threads(num_ranks: int) -> list[ThreadCollectives]:
    """Return the ends of all ranks, which meet one another."""
    store = dist.HashStore()
    ends: list[ThreadCollectives | None] = [None] * num_ranks

    def join(rank: int) -> None:
        ends[rank] = ThreadCollectives(store, rank, num_ranks)

    run_ranks(num_ranks, join)
    return [end for end in ends if end is not None]


def run_ranks(num_ranks: int, work: Any) -> list[Any]:
    """Call `work(rank)` in as many threads; return what they returned, or raise what one raised."""
    results: list[Any] = [None] * num_ranks
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as error:  # noqa: BLE001  (raised again in the caller)
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def shard_of(
    spec: ModelSpec,
    state: Mapping[str, torch.Tensor],
    group: TorchCollectives,
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """Return one rank's part of a model with these parameters."""
    shard = ModelShard(Partition(spec.geometry, group.num_ranks), group.rank)
    own = ((name, shard.own(name, tensor, spec)) for name, tensor in state.items())
    weights = fill_weights(shard.spec(spec), own, dtype=dtype)
    return Transformer(spec, weights, group=group)


class _Follower(threading.Thread):
    """A rank that does what it is told to, in that order."""

    def __init__(self, rank: int, runner: StepRunner, pool: PagePool) -> None:
        super().__init__(daemon=True)
        self._runner = runner
        self._hearer = PlanHearer(pool.layout)
        self._packer = FilePacker(pool.dtype, rank=rank)
        self._writer = DirectWriter(pool)
        self.work: queue.SimpleQueue[bytes | AdapterLoad | None] = queue.SimpleQueue()
        self.loaded: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        while (work := self.work.get()) is not None:
            if isinstance(work, AdapterLoad):
                self._load(work)
            else:
                self._runner.launch(self._hearer.hear(pickle.loads(work))).result()

    def _load(self, load: AdapterLoad) -> None:
        held = self._writer.buffer(load.layout.num_pages)
        self._packer.fill(held, Path(load.adapter.path), load.layout)
        self._writer.write(load.pages, held, after=None)
        self.loaded.put(load.adapter.adapter_id)


class _LeadingRunner:
    """Implements `runner.StepRunner`."""

    def __init__(self, own: StepRunner, followers: list[_Follower]) -> None:
        self._own = own
        self._followers = followers
        self._teller = PlanTeller()

    def launch(self, plan: Plan) -> Flight:
        told = pickle.dumps(self._teller.tell(plan))
        for follower in self._followers:
            follower.work.put(told)
        return self._own.launch(plan)


class _Loads:
    """Implements `loader.LoadPeers`: followers keep nothing in host memory."""

    host_bytes = 0

    def __init__(self, followers: list[_Follower]) -> None:
        self._followers = followers

    @property
    def num_ranks(self) -> int:
        return 1 + len(self._followers)

    def load(self, load: AdapterLoad) -> None:
        for follower in self._followers:
            follower.work.put(load)

    def prefetch(self, adapter: AdapterManifest) -> None: ...

    def discard(self, adapter_id: str) -> None: ...

    def is_discarding(self, adapter_id: str) -> bool:
        return False

    def wait(self, adapter_id: str) -> str | None:
        for follower in self._followers:
            assert follower.loaded.get(timeout=_TIMEOUT.total_seconds()) == adapter_id
        return None

    def close(self) -> None: ...


class ThreadTeam:
    """An engine of several ranks; `core` is the first's."""

    def __init__(
        self,
        spec: ModelSpec,
        state: Mapping[str, torch.Tensor],
        num_ranks: int,
        *,
        num_pages: int = 512,
        max_step_tokens: int = 256,
        max_running: int = 32,
        max_model_len: int = 128,
        dtype: torch.dtype = torch.float32,
        make_runner: Callable[[Transformer, PagePool], StepRunner] = Runner,
        choice: PolicyChoice | None = None,
        overlap: bool = False,
    ) -> None:
        self._num_threads = torch.get_num_threads()
        torch.set_num_threads(max(1, self._num_threads // num_ranks))
        self.layout = PoolLayout(spec.geometry, num_ranks=num_ranks)
        self.groups = join_threads(num_ranks)
        models = [shard_of(spec, state, group, dtype) for group in self.groups]
        pools = [PagePool(self.layout, num_pages, dtype=dtype) for _ in models]
        # At once: to make one may take exchanges with the others.
        runners = run_ranks(num_ranks, lambda rank: make_runner(models[rank], pools[rank]))
        self._followers = [
            _Follower(rank, runners[rank], pools[rank]) for rank in range(1, num_ranks)
        ]
        limits = SchedulerLimits(
            max_step_tokens=max_step_tokens,
            max_running=max_running,
            max_model_len=max_model_len,
            eos_token_ids=spec.eos_token_ids,
        )
        runner = _LeadingRunner(runners[0], self._followers)
        self.core: EngineCore = assemble_core(
            models[0],
            pools[0],
            limits,
            choice=choice,
            runner=runner,
            overlap=overlap,
            peers=_Loads(self._followers),
        )

    def close(self) -> None:
        self.core.close()
        for follower in self._followers:
            follower.work.put(None)
            follower.join()
        torch.set_num_threads(self._num_threads)
