"""Plans on their way to other ranks: each tells what is new in it since the one before.

A request names its whole prompt and an adapter its ranks on every linear, and both stay in the
batch for hundreds of steps; besides, other ranks draw no tokens. So a step of 64 decodes behind
2,000 tokens each takes 38 kB and 0.3 ms of both ends, where the plan as it is takes 447 kB and
4.4 ms. Both ends remember what the last plan named, and nothing else.
"""

from __future__ import annotations

from dataclasses import replace

from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.layout import PoolLayout
from loraplex_scheduler.plan import Plan, PlannedAdapter, Request, SequenceStep
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.engine.ranks.messages import RunStep


class PlanTeller:
    """Owned by rank 0's runner, which tells every plan it launches."""

    def __init__(self) -> None:
        self._requests: dict[str, Request] = {}
        self._layouts: dict[str, AdapterLayout] = {}

    def tell(self, plan: Plan) -> RunStep:
        """Return what a rank that was told all plans before must know of this one."""
        requests = {step.request_id: step.request for step in plan.sequences}
        layouts = {i: adapter.layout for i, adapter in plan.adapters.items()}
        # By identity: an id may return with another request, once the first one has ended.
        new = [r for i, r in requests.items() if self._requests.get(i) is not r]
        specs = {i: x.spec for i, x in layouts.items() if self._layouts.get(i) is not x}
        self._requests, self._layouts = requests, layouts
        return RunStep(
            requests=tuple(map(_computed_part, new)),
            specs=specs,
            rows=tuple(
                (
                    step.request_id,
                    step.start,
                    step.num_tokens,
                    step.token_ids,
                    tuple(step.block_table),
                    step.is_sampled,
                    step.awaits_token,
                    step.wants_states,
                )
                for step in plan.sequences
            ),
            pages={i: adapter.pages for i, adapter in plan.adapters.items()},
        )


class PlanHearer:
    """Owned by the loop of a rank other than 0; hears every plan, in order.

    Args:
        layout: of the rank's pool.
    """

    def __init__(self, layout: PoolLayout) -> None:
        self._layout = layout
        self._requests: dict[str, Request] = {}
        self._layouts: dict[str, AdapterLayout] = {}

    def hear(self, told: RunStep) -> Plan:
        """Return the plan as far as computing it goes; nothing in it is about drawing tokens."""
        known = self._requests | {request.request_id: request for request in told.requests}
        new = {i: AdapterLayout(self._layout, spec) for i, spec in told.specs.items()}
        layouts = self._layouts | new
        self._requests = {row[0]: known[row[0]] for row in told.rows}
        self._layouts = {i: layouts[i] for i in told.pages}
        steps = tuple(
            SequenceStep(
                request=known[request_id],
                start=start,
                num_tokens=num_tokens,
                token_ids=token_ids,
                block_table=block_table,
                is_sampled=is_sampled,
                awaits_token=awaits_token,
                wants_states=wants_states,
            )
            for (
                request_id,
                start,
                num_tokens,
                token_ids,
                block_table,
                is_sampled,
                awaits_token,
                wants_states,
            ) in told.rows
        )
        adapters = {i: PlannedAdapter(self._layouts[i], p) for i, p in told.pages.items()}
        return Plan(steps, loads=(), adapters=adapters)


def _computed_part(request: Request) -> Request:
    """Return a request without what only scheduling and drawing tokens ask of it.

    Its prompt stays where the step judges it: logits of its tokens are a collective's.
    """
    asked = request.sampling.prompt_logprobs
    return replace(
        request,
        prompt_token_ids=request.prompt_token_ids if asked is not None else (),
        sampling=SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=asked),
        tenant="",
        prefix_salt="",
    )
