"""Schedulers over small pools, and results for their plans without a model.

`tests/support/shadow_device.py` has a device that checks the plans, too.
"""

from __future__ import annotations

from loraplex_memory.accounts import PoolAccounts
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.adapter_spec import SOFT_PROMPT, AdapterRanks, AdapterSpec, Part
from loraplex_memory.layout import ModelGeometry, PoolLayout
from loraplex_scheduler.limits import SchedulerLimits
from loraplex_scheduler.plan import Event, Plan, Request, SampledToken, StepResult
from loraplex_scheduler.policies import PolicyChoice, make_eviction, make_policies
from loraplex_scheduler.sampling import SamplingParams
from loraplex_scheduler.scheduler import Scheduler

TINY = ModelGeometry(
    num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=64
)
EOS = 0


def ranks(rank: int) -> AdapterRanks:
    """Return `rank` on q, k, v and o of every layer of TINY."""
    return ((rank,) * 4 + (0,) * 3,) * TINY.num_layers


def make_manifest(
    name: str, rank: int = 4, *, num_virtual: int = 0, is_activated: bool = False
) -> AdapterManifest:
    """Return an adapter; `is_activated`: one that begins to matter inside the prompt."""
    parts = (Part(SOFT_PROMPT, num_virtual, TINY.hidden_size),) if num_virtual else ()
    spec = AdapterSpec(ranks(rank), parts, invocation_token_ids=(1,) if is_activated else ())
    return AdapterManifest(adapter_id=name, path=f"/nowhere/{name}", spec=spec)


def make_request(
    request_id: str,
    *,
    num_prompt: int = 4,
    max_tokens: int = 4,
    adapter: AdapterManifest | None = None,
    arrival_s: float = 0.0,
    deadline_s: float | None = None,
    first_token_by_s: float | None = None,
    tenant: str = "",
    priority: int = 0,
    prompt: tuple[int, ...] | None = None,
    adapter_start: int = 0,
    num_virtual: int = 0,
    adapter_weight: float = 1.0,
    more_adapters: tuple[tuple[AdapterManifest, float], ...] = (),
    **sampling: object,
) -> Request:
    """Return a request; all prompts of a length are equal unless one is given."""
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt or tuple(range(1, num_prompt + 1)),
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
        adapter=adapter,
        arrival_s=arrival_s,
        deadline_s=deadline_s,
        first_token_by_s=first_token_by_s,
        tenant=tenant,
        priority=priority,
        adapter_start=adapter_start,
        num_virtual=num_virtual,
        adapter_weight=adapter_weight,
        more_adapters=more_adapters,
    )


#: As little as possible between a test and what it looks at.
PLAIN = PolicyChoice(order="fcfs", admission="greedy", eviction="lru", has_prefix_cache=False)


class FixedCosts:
    """What it costs to restore things, for accounts without a scheduler."""

    def adapter_s(self, num_pages: int) -> float:
        return 1e-3 * num_pages

    def prefix_page_s(self) -> float:
        return 1e-3


def make_accounts(
    num_pages: int = 64, *, page_tokens: int = 4, choice: PolicyChoice = PLAIN
) -> PoolAccounts:
    return PoolAccounts(
        PoolLayout(TINY, page_tokens),
        num_pages,
        eviction=make_eviction(choice),
        costs=FixedCosts(),
        has_prefix_cache=choice.has_prefix_cache,
    )


def make_scheduler(
    num_pages: int = 64,
    *,
    page_tokens: int = 4,
    max_step_tokens: int = 16,
    max_running: int = 8,
    max_model_len: int = 64,
    max_loading: int = 4,
    choice: PolicyChoice = PLAIN,
) -> Scheduler:
    limits = SchedulerLimits(
        max_step_tokens=max_step_tokens,
        max_running=max_running,
        max_model_len=max_model_len,
        max_loading=max_loading,
        eos_token_ids=frozenset({EOS}),
    )
    accounts = make_accounts(num_pages, page_tokens=page_tokens, choice=choice)
    return Scheduler(limits, accounts, make_policies(choice, limits, page_tokens))


def result_of(plan: Plan, token_id: int = 9) -> StepResult:
    """Return `token_id` for every sampled sequence of the plan."""
    sampled = [step.request_id for step in plan.sequences if step.is_sampled]
    return StepResult({request_id: SampledToken(token_id) for request_id in sampled})


def compute(scheduler: Scheduler, plan: Plan, token_id: int = 9) -> list[Event]:
    """Book a plan as launched and its result right after, as without overlap."""
    scheduler.advance(plan)
    return scheduler.commit(plan, result_of(plan, token_id))


def finish_loads(scheduler: Scheduler, plan: Plan) -> None:
    for load in plan.loads:
        scheduler.finish_load(load.adapter.adapter_id)
