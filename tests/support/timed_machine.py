"""A scheduler in simulated time, on a machine whose steps and loads take a known time."""

from __future__ import annotations

import random

from loraplex_scheduler.limits import SchedulerLimits
from loraplex_scheduler.plan import EndEvent, FinishReason, SampledToken, StepResult
from loraplex_scheduler.policies import PolicyChoice, make_policies
from loraplex_scheduler.scheduler import Scheduler
from loraplex_scheduler.step_times import StepLoad, StepTimes
from tests.support.scheduling import EOS, make_accounts, make_manifest, make_request, result_of
from tests.support.sequences import SequenceFactory, answer

PAGE_TOKENS = 4


class LinearTimes:
    """Steps take what their tokens, sequences and cached tokens take, and loads 50 ms.

    `scale` makes it a faster or slower machine.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def step_s(self, load: StepLoad) -> float:
        rows = 1e-4 * load.num_tokens + 2e-4 * load.num_sequences + 1e-7 * load.kv_tokens
        return self.scale * (0.01 + rows + 1e-6 * load.adapter_pages)

    def observe_step(self, load: StepLoad, took_s: float) -> None:
        """It knows already."""

    def adapter_s(self, num_pages: int) -> float:
        return self.scale * 0.05

    def observe_load(self, num_pages: int, took_s: float) -> None:
        """It knows already."""

    def prefix_page_s(self) -> float:
        return self.scale * 1e-4 * PAGE_TOKENS


class TimedMachine:
    """Serves requests with prompts of 20 to 60 tokens and answers of about `answer_len`.

    Attributes:
        first_tokens: when each request got its first token.
        rejected: the event of each that was refused or dropped, and when.
    """

    def __init__(
        self,
        *,
        choice: PolicyChoice | None = None,
        num_pages: int = 4096,
        max_running: int = 16,
        max_step_tokens: int = 128,
        answer_len: int = 40,
        seed: int = 0,
        believed: StepTimes | None = None,
    ) -> None:
        """
        Args:
            believed: what the policies take the times to be; default: the truth.
        """
        choice = choice or PolicyChoice(order="fcfs", has_prefix_cache=False)
        limits = SchedulerLimits(
            max_step_tokens=max_step_tokens,
            max_running=max_running,
            max_model_len=1000,
            eos_token_ids=frozenset({EOS}),
        )
        accounts = make_accounts(num_pages, page_tokens=PAGE_TOKENS, choice=choice)
        self.times = LinearTimes()
        self.policies = make_policies(choice, limits, PAGE_TOKENS, believed or self.times)
        self.scheduler = Scheduler(limits, accounts, self.policies)
        self.make = SequenceFactory(page_tokens=PAGE_TOKENS)
        self.now = 0.0
        self.first_tokens: dict[str, float] = {}
        self.rejected: dict[str, tuple[EndEvent, float]] = {}
        self._rng = random.Random(seed)
        self._answer_len = answer_len
        self._num_left: dict[str, int] = {}
        self._loads: list[tuple[float, str]] = []  # done when
        self._num_added = 0
        for _ in range(300):  # so that it knows how long answers are
            ended = answer(self.make(num_prompt=2, max_tokens=500), self._usual_answer())
            self.policies.lengths.observe(ended)

    def add(self, *, adapter: str | None = None, num_prompt: int = 0, **fields: object) -> str:
        """Add a request that arrives now; return its id."""
        name, self._num_added = f"r{self._num_added}", self._num_added + 1
        self._num_left[name] = self._usual_answer()
        request = make_request(
            name,
            num_prompt=num_prompt or self._rng.randint(20, 60),
            max_tokens=500,
            arrival_s=self.now,
            adapter=make_manifest(adapter) if adapter else None,
            **fields,
        )
        self._note(self.scheduler.add(request))
        return name

    def step(self) -> None:
        """Run one step, or wait for a load."""
        for load in [load for load in self._loads if load[0] <= self.now]:
            self.scheduler.finish_load(load[1])
            self._loads.remove(load)
        self._note(self.scheduler.drop_hopeless(self.now))
        plan = self.scheduler.schedule(self.now)
        last_s = max([self.now, *(done_s for done_s, _ in self._loads)])
        for load in plan.loads:  # one after the other
            last_s += self.times.adapter_s(len(load.pages))
            self._loads.append((last_s, load.adapter.adapter_id))
        if not plan.sequences:
            self.now = min((done_s for done_s, _ in self._loads), default=self.now + 0.01)
            return
        num_tokens = sum(step.num_tokens for step in plan.sequences)
        kv_tokens = sum(step.start + step.num_tokens for step in plan.sequences)
        adapter_pages = sum(len(adapter.pages) for adapter in plan.adapters.values())
        took_s = self.times.step_s(
            StepLoad(num_tokens, len(plan.sequences), kv_tokens, adapter_pages)
        )
        self.scheduler.advance(plan)
        self.now += took_s
        self._note(self.scheduler.commit(plan, self._result(plan), took_s))

    def run_until(self, time_s: float) -> None:
        while self.now < time_s:
            self.step()

    def first_token_s(self, **fields: object) -> float:
        """Add a request with a prompt of 40 and return the seconds until its first token came."""
        start_s, name = self.now, self.add(num_prompt=40, **fields)
        while name not in self.first_tokens:
            self.step()
        return self.first_tokens[name] - start_s

    def _usual_answer(self) -> int:
        return max(1, round(self._rng.uniform(0.5, 1.5) * self._answer_len))

    def _result(self, plan) -> StepResult:
        tokens = result_of(plan).tokens
        for name in tokens:
            self._num_left[name] -= 1
            if self._num_left[name] == 0:
                tokens[name] = SampledToken(EOS)
        return StepResult(tokens)

    def _note(self, events) -> None:
        for event in events:
            if not isinstance(event, EndEvent):
                self.first_tokens.setdefault(event.request_id, self.now)
            elif event.finish_reason is FinishReason.REJECTED:
                self.rejected[event.request_id] = event, self.now
