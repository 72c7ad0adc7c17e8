"""Trace rows as the scheduler's requests, with token ids that tell content apart.

Nothing reads the ids but the prefix cache, so one id stands for a whole run of tokens: every
request's own prompt, every answer and every adapter's system prompt is one id, repeated, that
nothing else in the trace has.
"""

from __future__ import annotations

from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_scheduler.plan import Request, SampledToken
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.simulator.models import AdapterSet
from loraplex_server.simulator.trace import NOBODY, Trace


class RequestBook:
    """Makes requests of one trace; shared by the replicas of a fleet.

    Attributes:
        followers: index of the next turn of a conversation, by index of the turn before.
    """

    def __init__(
        self,
        trace: Trace,
        adapters: AdapterSet,
        num_layers: int,
        *,
        promise_s: float | None = None,
    ) -> None:
        """`promise_s`: every request asks for its first token within so many seconds."""
        self.trace = trace
        self.adapters = adapters
        self._ranks = [adapters.layer_ranks(i, num_layers) for i in range(len(adapters.ranks))]
        self._promise_s = promise_s
        self._prompt_len: list[int] = trace.prompt_len.tolist()
        self._output_len: list[int] = trace.output_len.tolist()
        self._adapter: list[int] = trace.adapter.tolist()
        self._tenant = [str(tenant) for tenant in trace.tenant.tolist()]
        self._follows: list[int] = trace.follows.tolist()
        self.followers = {
            before: index for index, before in enumerate(self._follows) if before != NOBODY
        }
        self._manifests: dict[int, AdapterManifest] = {}
        self._histories: dict[int, tuple[int, ...]] = {}
        self._sampling: dict[int, SamplingParams] = {}

    def make(self, index: int, arrival_s: float) -> Request:
        """Return request number `index` as it arrives; each may be made once."""
        prompt = self._prompt(index)
        if index in self.followers:
            answer = (_answer_id(index),) * self._output_len[index]
            self._histories[index] = prompt + answer
        return Request(
            request_id=str(index),
            prompt_token_ids=prompt,
            sampling=self._sampling_of(self._output_len[index]),
            adapter=self.manifest(self._adapter[index]),
            arrival_s=arrival_s,
            first_token_by_s=None if self._promise_s is None else arrival_s + self._promise_s,
            tenant=self._tenant[index],
        )

    def manifest(self, adapter: int) -> AdapterManifest | None:
        """Return what identifies an adapter; None for the base model."""
        if adapter == NOBODY:
            return None
        manifest = self._manifests.get(adapter)
        if manifest is None:
            ranks = self._ranks[adapter % len(self._ranks)]
            manifest = AdapterManifest(
                adapter_id=adapter_id(adapter), path="", spec=AdapterSpec(ranks)
            )
            self._manifests[adapter] = manifest
        return manifest

    def answer(self, index: int) -> SampledToken:
        """Return what the device samples for this request, every time."""
        return SampledToken(_answer_id(index))

    def forget(self, index: int) -> None:
        """Request `index` was not answered in full, so its conversation ends."""
        self._histories.pop(index, None)

    def _prompt(self, index: int) -> tuple[int, ...]:
        own = (2 * index,) * self._prompt_len[index]
        if self._follows[index] != NOBODY:
            return self._histories.pop(self._follows[index]) + own
        shared_id = 2 * len(self._follows) + 1 + self._adapter[index]
        return (shared_id,) * self.trace.shared_len + own

    def _sampling_of(self, output_len: int) -> SamplingParams:
        sampling = self._sampling.get(output_len)
        if sampling is None:
            sampling = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
            self._sampling[output_len] = sampling
        return sampling


def adapter_id(adapter: int) -> str:
    """Return the id of the adapter with this index."""
    return f"adapter-{adapter}"


def _answer_id(index: int) -> int:
    return 2 * index + 1
