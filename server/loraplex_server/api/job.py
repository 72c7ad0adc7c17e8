"""What one HTTP request asks the engine for, and on which terms. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_scheduler.plan import Pooling
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.adapters.lease import AdapterLease
from loraplex_server.text.assembler import TextOptions

if TYPE_CHECKING:
    from loraplex_server.api.exchange import Exchange


@dataclass(frozen=True)
class Terms:
    """Who pays for a request, and how soon it is wanted.

    Attributes:
        tenant: on whose account it runs; "" where nobody tells tenants apart.
        priority: lower ones are served first.
        deadline_s: seconds until the whole answer is due, if the client said so.
        ttft_slo_s: seconds until the first token is due; the server's setting if None.
        exchange: the HTTP request it came with, where those are observed.
        prefix_salt: see `Request`.
    """

    tenant: str = ""
    priority: int = 0
    deadline_s: float | None = None
    ttft_slo_s: float | None = None
    exchange: Exchange | None = None
    prefix_salt: str = ""


@dataclass(frozen=True)
class WeightedAdapter:
    """One of the adapters that answer a request; `weight` is a factor on all that it adds."""

    lease: AdapterLease
    weight: float = 1.0


@dataclass(frozen=True)
class Job:
    """`n` samples of each prompt.

    Sequence `i` is sample `i % n` of prompt `i // n`.

    Attributes:
        model: what the answer calls who gave it.
        adapters: none is the base model; what several add is added up.
        pooling: nothing is generated: each prompt becomes an embedding.
        is_prompt_only: the one token of each answer is computed for the sake of its prompt's log
            probabilities, and nobody gets it.
    """

    job_id: str
    model: str
    prompts: tuple[tuple[int, ...], ...]
    n: int
    sampling: SamplingParams
    text: TextOptions
    adapters: tuple[WeightedAdapter, ...]
    terms: Terms
    pooling: Pooling | None = None
    is_prompt_only: bool = False

    @property
    def weighted_manifests(self) -> tuple[tuple[AdapterManifest, float], ...]:
        """The adapters as the engine knows them: of one content under two names, one."""
        manifests: dict[str, AdapterManifest] = {}
        weights: dict[str, float] = {}
        for adapter in self.adapters:
            manifest = adapter.lease.manifest
            manifests[manifest.adapter_id] = manifest
            weights[manifest.adapter_id] = weights.get(manifest.adapter_id, 0.0) + adapter.weight
        return tuple((manifest, weights[name]) for name, manifest in manifests.items())

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.n

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(map(len, self.prompts))

    @property
    def has_no_answer(self) -> bool:
        """Nobody gets, or pays for, more than the prompts."""
        return self.pooling is not None or self.is_prompt_only

    @property
    def max_tokens(self) -> int:
        """Tokens that the job can cost at most, prompts included."""
        if self.has_no_answer:
            return self.num_prompt_tokens
        return self.num_prompt_tokens + self.num_sequences * self.sampling.max_tokens
