"""What newcomers leave to those who run, and that the worst case is enough in every company."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_scheduler.admission import Expected, Greedy, WorstCase
from loraplex_scheduler.answer_lengths import AnswerLengths
from loraplex_scheduler.limits import SchedulerLimits
from loraplex_scheduler.policies import ADMISSIONS, PolicyChoice, make_policies
from loraplex_scheduler.scheduler import Scheduler
from tests.support.scheduling import EOS, make_accounts, make_request, result_of
from tests.support.sequences import SequenceFactory, answer, run

PAGE_TOKENS = 4
BUDGET = 1024


def worst_case(*, has_prefix_cache=False):
    return WorstCase(AnswerLengths(), PAGE_TOKENS, BUDGET, has_prefix_cache=has_prefix_cache)


def expected(*lengths, make):
    """Return the policy after it has seen answers of these lengths."""
    policy = Expected(AnswerLengths(), PAGE_TOKENS, BUDGET)
    for length in lengths:
        policy.ended(answer(make(num_prompt=1, max_tokens=1000), length))
    return policy


def pages(num_tokens):
    return -(-num_tokens // PAGE_TOKENS)


def test_greedy_leaves_a_page_to_each_who_runs():
    make, policy = SequenceFactory(), Greedy(AnswerLengths())
    policy.begin([run(make()) for _ in range(3)])
    newcomer = make(max_tokens=500)
    assert policy.pages_to_leave(newcomer) == 3
    policy.admitted(run(newcomer))
    assert policy.pages_to_leave(make()) == 4


@pytest.mark.parametrize("has_prefix_cache", [False, True])
def test_alone_a_newcomer_leaves_what_its_own_longest_answer_takes(has_prefix_cache):
    make, policy = SequenceFactory(), worst_case(has_prefix_cache=has_prefix_cache)
    policy.begin([])
    newcomer = make(num_prompt=10, max_tokens=9)
    # The last token is sampled and gets no page.
    assert policy.pages_to_leave(newcomer) == pages(10 + 9 - 1) - pages(10)


def test_alone_it_may_fill_the_whole_pool():
    make, policy = SequenceFactory(), worst_case()
    policy.begin([])
    newcomer = make(num_prompt=10, max_tokens=1000, max_len=16 * PAGE_TOKENS)
    assert pages(10) + policy.pages_to_leave(newcomer) <= 16


def test_pages_of_who_ends_first_are_counted_on():
    make, policy = SequenceFactory(), worst_case()
    ends_soon = run(make(num_prompt=400, max_tokens=4), 2)
    policy.begin([ends_soon])
    grows_long = make(num_prompt=4, max_tokens=200)
    assert policy.pages_to_leave(grows_long) <= 3


def test_pages_that_others_may_share_are_not_counted_on():
    make = SequenceFactory(choice=PolicyChoice(admission="worst-case"))
    ends_soon = run(make(num_prompt=400, max_tokens=4), 2)
    newcomer = make(num_prompt=4, max_tokens=200)
    leaves = []
    for num_published in (0, 400):
        ends_soon.table.publish(ends_soon.token_ids, num_published, may_replace=True)
        policy = worst_case(has_prefix_cache=True)
        policy.begin([ends_soon])
        leaves.append(policy.pages_to_leave(newcomer))
    assert leaves[0] <= 3
    assert leaves[1] >= pages(200) - 1


def test_each_admitted_in_a_step_is_left_room_by_the_next():
    make, policy = SequenceFactory(), worst_case()
    policy.begin([])
    needed = []
    for _ in range(4):
        newcomer = make(num_prompt=8, max_tokens=40)
        needed.append(policy.pages_to_leave(newcomer))
        policy.admitted(run(newcomer))
    assert needed == sorted(needed)
    assert needed[-1] >= 4 * (pages(8 + 39) - pages(8))


companies = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 39)), min_size=1, max_size=8
)


@given(companies, st.integers(1, 8), st.sampled_from([WorstCase, Expected]))
def test_exactly_as_many_pages_as_must_be_left_are_enough(company, budget, kind):
    make, lengths = SequenceFactory(), AnswerLengths()
    options = {"has_prefix_cache": True} if kind is WorstCase else {}
    policy = kind(lengths, PAGE_TOKENS, len(company) + budget, **options)
    running = []
    for num_prompt, max_tokens, num_generated in company:
        newcomer = make(num_prompt=num_prompt, max_tokens=max_tokens)
        policy.begin(running)
        num_left = policy.pages_to_leave(newcomer)
        for num_pages in (num_left - 1, num_left, num_left + 1, 10_000):
            policy.begin(running)
            assert policy.is_enough(num_pages, newcomer) == (num_pages >= num_left)
        running.append(run(newcomer, min(num_generated, max_tokens - 1)))


requests = st.lists(
    st.tuples(
        st.integers(0, 12),  # steps after the one before
        st.integers(1, 40),  # prompt
        st.integers(1, 40),  # longest answer
        st.integers(1, 40),  # tokens after which it stops
    ),
    min_size=1,
    max_size=14,
)


class Drive:
    """Drives a scheduler with worst-case admission; nothing but sequences takes pages."""

    def __init__(self, num_pages, max_step_tokens, **choice):
        choice = PolicyChoice(order="fcfs", admission="worst-case", **choice)
        limits = SchedulerLimits(
            max_step_tokens=max_step_tokens,
            max_running=8,
            max_model_len=80,
            eos_token_ids=frozenset({EOS}),
        )
        accounts = make_accounts(num_pages, page_tokens=PAGE_TOKENS, choice=choice)
        policies = make_policies(choice, limits, PAGE_TOKENS)
        self.scheduler = Scheduler(limits, accounts, policies)
        self.num_left = {}
        self.now = 0.0

    def add(self, name, num_prompt, max_tokens, stops_after):
        self.scheduler.add(
            make_request(name, num_prompt=num_prompt, max_tokens=max_tokens, arrival_s=self.now)
        )
        self.num_left[name] = stops_after

    def step(self):
        self.now += 1.0
        plan = self.scheduler.schedule(self.now)
        for step in plan.sequences:
            self.num_left[step.request_id] -= step.is_sampled
        result = result_of(plan)
        for name, token in result.tokens.items():
            if self.num_left[name] == 0:
                result.tokens[name] = type(token)(EOS)
        if plan.sequences:
            self.scheduler.advance(plan)
            self.scheduler.commit(plan, result)


@settings(max_examples=150, deadline=None)
@given(
    requests=requests,
    num_pages=st.integers(20, 40),
    max_step_tokens=st.sampled_from([8, 12, 64]),
    batching=st.sampled_from(["mixed", "separate"]),
    has_prefix_cache=st.booleans(),
)
def test_worst_case_never_preempts_and_serves_everybody(
    requests, num_pages, max_step_tokens, batching, has_prefix_cache
):
    drive = Drive(num_pages, max_step_tokens, batching=batching, has_prefix_cache=has_prefix_cache)
    for i, (gap, *lengths) in enumerate(requests):
        for _ in range(gap):
            drive.step()
        drive.add(f"r{i}", *lengths)
    for _ in range(3000):
        if not drive.scheduler.has_work:
            break
        drive.step()
        assert drive.scheduler.num_preemptions == 0
    assert not drive.scheduler.has_work


def test_greedy_in_the_same_place_does_preempt():
    """Or the test above would hold for any policy."""
    drive = Drive(20, 64, batching="mixed", has_prefix_cache=False)
    greedy = make_policies(
        PolicyChoice(order="fcfs", admission="greedy", has_prefix_cache=False),
        drive.scheduler.limits,
        PAGE_TOKENS,
    )
    accounts = make_accounts(20, page_tokens=PAGE_TOKENS)
    drive.scheduler = Scheduler(drive.scheduler.limits, accounts, greedy)
    for i in range(6):
        drive.add(f"r{i}", 10, 40, 40)
    for _ in range(300):
        drive.step()
    assert drive.scheduler.num_preemptions > 0


def test_expected_reserves_for_answers_as_long_as_those_before():
    make = SequenceFactory()
    newcomer_leaves = {}
    for length in (20, 200):
        policy = expected(*[length] * 200, make=make)
        policy.begin([run(make(num_prompt=8, max_tokens=1000), 1) for _ in range(4)])
        newcomer_leaves[length] = policy.pages_to_leave(make(num_prompt=8, max_tokens=1000))
    assert newcomer_leaves[20] < 5 * pages(30)
    assert newcomer_leaves[200] > 5 * pages(150)


def test_expected_never_reserves_more_than_the_worst_case():
    make = SequenceFactory()
    policy, worst = expected(*[500] * 50, make=make), worst_case()
    running = [run(make(num_prompt=8, max_tokens=20), 3) for _ in range(4)]
    newcomer = make(num_prompt=8, max_tokens=20)
    policy.begin(running)
    worst.begin(running)
    assert policy.pages_to_leave(newcomer) == worst.pages_to_leave(newcomer)


def test_expected_leaves_at_least_a_page_to_each_who_runs():
    make = SequenceFactory()
    policy = expected(*[1] * 200, make=make)
    policy.begin([run(make(num_prompt=8, max_tokens=1000), 1) for _ in range(5)])
    assert policy.pages_to_leave(make(num_prompt=8, max_tokens=1000)) >= 5


def test_expected_does_not_count_on_pages_that_were_there_before():
    make = SequenceFactory()
    leaves = []
    for num_cached in (0, 400):
        policy = expected(*[10] * 100, make=make)
        ends_soon = run(make(num_prompt=400, max_tokens=12), 10)
        ends_soon.num_cached = num_cached
        policy.begin([ends_soon])
        leaves.append(policy.pages_to_leave(make(num_prompt=40, max_tokens=500)))
    assert leaves[0] <= leaves[1]


def test_every_admission_policy_learns_how_long_answers_become():
    make = SequenceFactory()
    limits = SchedulerLimits(max_step_tokens=BUDGET, max_running=8, max_model_len=80)
    for name in ADMISSIONS:
        policies = make_policies(PolicyChoice(admission=name), limits, PAGE_TOKENS)
        lengths = policies.lengths
        before = lengths.mean(None)
        for _ in range(10):
            policies.admission.ended(answer(make(num_prompt=1, max_tokens=1000), 900))
        assert lengths.mean(None) > before
