"""Fair shares: the paper's bound on a toy server, weights, the lift, and who pays for what."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_scheduler.vtc import FairQueue
from loraplex_scheduler.waiting import OrderedQueue, arrival_key
from tests.support.sequences import SequenceFactory

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0


def tenant_of(sequence):
    return sequence.request.tenant


def make_queue(weights=None):
    return FairQueue(tenant_of, weights, prompt_weight=PROMPT_WEIGHT, output_weight=OUTPUT_WEIGHT)


class ToyServer:
    """Batches continuously: admits while all tokens of the batch fit into `capacity`, then gives
    each one token. `served` is weighted service by tenant.
    """

    def __init__(self, queue, capacity):
        self.queue = queue
        self.capacity = capacity
        self.running = []
        self.served = Counter()
        self.order = []

    def step(self):
        for sequence in self.queue.in_order():
            held = sum(s.last_len for s in self.running)
            if held + sequence.last_len > self.capacity:
                break
            self.queue.remove(sequence)
            self.queue.charge_prompt(sequence, sequence.num_prompt)
            self.served[sequence.request.tenant] += PROMPT_WEIGHT * sequence.num_prompt
            self.running.append(sequence)
            self.order.append(sequence)
        for sequence in self.running:
            sequence.num_tokens += 1
            self.served[sequence.request.tenant] += OUTPUT_WEIGHT
        self.queue.charge_outputs(self.running)
        self.running = [s for s in self.running if not s.is_complete]


def push(queue, make, tenant, num=1, **fields):
    sequences = [make(tenant=tenant, **fields) for _ in range(num)]
    for sequence in sequences:
        queue.push(sequence)
    return sequences


lengths = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=8, max_size=8)


@settings(max_examples=60, deadline=None)
@given(by_tenant=st.lists(lengths, min_size=2, max_size=4), capacity=st.integers(24, 80))
def test_backlogged_clients_are_served_alike_within_the_papers_bound(by_tenant, capacity):
    make, queue = SequenceFactory(), make_queue()
    server = ToyServer(queue, capacity)
    names = [f"t{i}" for i in range(len(by_tenant))]
    bound = 2 * max(PROMPT_WEIGHT * 12, OUTPUT_WEIGHT * capacity)
    # Over every interval: the difference may not move by more than the bound.
    lowest, highest = Counter(), Counter()
    for step in range(150):
        for name, sizes in zip(names, by_tenant, strict=True):
            num_prompt, max_tokens = sizes[step % len(sizes)]
            waiting = sum(s.request.tenant == name for s in queue)
            push(queue, make, name, 40 - waiting, num_prompt=num_prompt, max_tokens=max_tokens)
        server.step()
        for f in names:
            for g in names:
                gap = server.served[f] - server.served[g]
                lowest[f, g] = min(lowest[f, g], gap)
                highest[f, g] = max(highest[f, g], gap)
                assert highest[f, g] - lowest[f, g] <= bound


@pytest.mark.parametrize("weight", [2.0, 5.0])
def test_service_is_shared_by_weight(weight):
    make, queue = SequenceFactory(), make_queue({"gold": weight})
    server = ToyServer(queue, 100)
    push(queue, make, "gold", 600)
    push(queue, make, "free", 600)
    for _ in range(100):
        server.step()
    assert server.served["gold"] / server.served["free"] == pytest.approx(weight, rel=0.15)


def test_a_flood_of_one_tenant_does_not_delay_another():
    make, queue = SequenceFactory(), make_queue()
    server = ToyServer(queue, 40)
    push(queue, make, "flood", 500)
    for _ in range(20):
        server.step()
    (single,) = push(queue, make, "single")
    before = len(server.order)
    while single not in server.order:
        server.step()
    assert server.order.index(single) - before <= 5


def test_time_spent_idle_banks_no_credit():
    make, queue = SequenceFactory(), make_queue()
    server = ToyServer(queue, 100)
    push(queue, make, "busy", 400)
    push(queue, make, "idle", 2)
    for _ in range(60):
        server.step()
    start = server.served.copy()
    assert start["busy"] > 10 * start["idle"]
    push(queue, make, "idle", 400)
    for _ in range(40):
        server.step()
    gained = {name: server.served[name] - start[name] for name in start}
    assert gained["idle"] == pytest.approx(gained["busy"], rel=0.15)


def test_who_comes_to_an_empty_queue_is_lifted_to_who_left_it_last():
    make, queue = SequenceFactory(), make_queue()
    server = ToyServer(queue, 100)
    push(queue, make, "busy", 30)
    while len(queue):
        server.step()
    push(queue, make, "new")
    assert queue.counter("new") == queue.counter("busy") > 0


def test_coming_back_does_not_cancel_what_was_served_already():
    make, queue = SequenceFactory(), make_queue()
    server = ToyServer(queue, 1000)
    push(queue, make, "greedy", 20, num_prompt=20)
    push(queue, make, "modest", 1, num_prompt=1)
    server.step()
    counter = queue.counter("greedy")
    push(queue, make, "modest", 1)
    push(queue, make, "greedy", 1)
    assert queue.counter("greedy") == counter
    assert tenant_of(next(queue.in_order())) == "modest"


def test_prompts_found_in_the_prefix_cache_cost_nothing():
    make, queue = SequenceFactory(), make_queue()
    (cached,) = push(queue, make, "cached", num_prompt=100)
    (computed,) = push(queue, make, "computed", num_prompt=100)
    for sequence, num_tokens in ((cached, 4), (computed, 100)):
        queue.remove(sequence)
        queue.charge_prompt(sequence, num_tokens)
    assert queue.counter("computed") - queue.counter("cached") == 96 * PROMPT_WEIGHT


def test_a_preempted_sequence_pays_for_its_prompt_once():
    make, queue = SequenceFactory(), make_queue()
    (sequence,) = push(queue, make, "a", num_prompt=10)
    queue.remove(sequence)
    queue.charge_prompt(sequence, 10)
    queue.charge_outputs([sequence])
    paid = queue.counter("a")
    queue.push(sequence)
    queue.remove(sequence)
    queue.charge_prompt(sequence, 11)
    assert queue.counter("a") == paid >= 10 * PROMPT_WEIGHT + OUTPUT_WEIGHT


def test_an_answer_is_charged_ahead_and_settled_when_it_ends():
    make, queue = SequenceFactory(), make_queue()
    short, again = push(queue, make, "a", 2, num_prompt=10)
    queue.remove(short)
    queue.charge_prompt(short, 10)
    ahead = queue.counter("a")
    assert ahead > 10 * PROMPT_WEIGHT
    queue.charge_outputs([short])
    assert queue.counter("a") == ahead  # it was paid for
    queue.settle(short)  # and ended without most of it
    queue.remove(again)
    queue.charge_prompt(again, 10)
    assert queue.counter("a") - ahead <= 10 * PROMPT_WEIGHT + OUTPUT_WEIGHT


def test_priority_goes_before_fairness():
    make, queue = SequenceFactory(), make_queue()
    push(queue, make, "poor", 3)
    (rich,) = push(queue, make, "rich", num_prompt=50)
    queue.remove(rich)
    queue.charge_prompt(rich, 50)
    (urgent,) = push(queue, make, "rich", priority=-1)
    assert next(queue.in_order()) is urgent


def test_within_a_client_the_oldest_goes_first():
    make, queue = SequenceFactory(), make_queue()
    old, middle, new = (make(tenant="a") for _ in range(3))
    for sequence in (middle, new, old):
        queue.push(sequence)
    assert list(queue.in_order()) == [old, middle, new]


@settings(max_examples=60, deadline=None)
@given(
    events=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9)), max_size=40
    ),
    capacity=st.integers(20, 60),
)
def test_with_one_client_it_is_first_come_first_served(events, capacity):
    servers = []
    for queue in (make_queue(), OrderedQueue(arrival_key)):
        make, server = SequenceFactory(), ToyServer(queue, capacity)
        for num, num_prompt, max_tokens in events:
            push(queue, make, "only", num, num_prompt=num_prompt, max_tokens=max_tokens)
            server.step()
        servers.append(server)
    fair, plain = ([s.order for s in server.order] for server in servers)
    assert fair == plain


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_walk_yields_each_once_and_the_next_always_has_the_least_counter(data):
    make, queue = SequenceFactory(), make_queue()
    for _ in range(data.draw(st.integers(1, 3))):  # several steps
        for _ in range(data.draw(st.integers(0, 12))):
            tenant, priority = data.draw(st.tuples(st.sampled_from("abc"), st.integers(0, 1)))
            push(queue, make, tenant, priority=priority)
        waiting, seen = set(queue), []
        for sequence in queue.in_order():
            seen.append(sequence)
            behind = waiting - set(seen)
            for other in behind:
                order = (sequence.request.priority, queue.counter(tenant_of(sequence)))
                assert order <= (other.request.priority, queue.counter(tenant_of(other)))
            action = data.draw(st.sampled_from(["admit", "pass", "stop"]))
            if action == "stop":
                break
            if action == "admit":
                queue.remove(sequence)
                queue.charge_prompt(sequence, data.draw(st.integers(1, 20)))
                queue.charge_outputs([sequence])
        else:
            assert set(seen) == waiting
        assert len(seen) == len(set(seen))


def test_one_that_ends_while_it_waits_and_comes_back_changes_nothing():
    make, queue = SequenceFactory(), make_queue()
    sequences = push(queue, make, "a", 2)
    for _ in range(3):
        queue.remove(sequences[0])
        queue.push(sequences[0])
    assert list(queue.in_order()) == sequences


def test_every_backlogged_client_is_served_again_and_again():
    make, queue = SequenceFactory(), make_queue({"heavy": 100.0})
    server = ToyServer(queue, 30)
    push(queue, make, "heavy", 3000)
    push(queue, make, "light", 10)
    for _ in range(1000):
        server.step()
    assert sum(tenant_of(s) == "light" for s in server.order) >= 5


def test_thousands_of_idle_clients_are_forgotten_but_none_that_waits():
    make, queue = SequenceFactory(), make_queue()
    (waiting,) = push(queue, make, "waiting")
    for i in range(20_000):
        (sequence,) = push(queue, make, f"t{i}")
        queue.remove(sequence)
    assert queue.num_clients < 10_000
    assert list(queue.in_order()) == [waiting]


def test_who_is_ahead_is_foreseen_as_it_then_happens():
    make, queue = SequenceFactory(), make_queue()
    server = ToyServer(queue, 60)
    push(queue, make, "a", 60)
    push(queue, make, "b", 60)
    for _ in range(40):  # so that it knows how long answers are
        server.step()
    (last,) = push(queue, make, "c", 10)[-1:]
    ahead = queue.ahead_of(last, limit=8)
    assert len(ahead.sequences) == 8
    foreseen, before = 8 + ahead.num_more, len(server.order)
    while last not in server.order:
        server.step()
    assert server.order.index(last) - before == pytest.approx(foreseen, rel=0.3)


def test_who_was_served_more_is_not_ahead_of_a_client_that_was_served_less():
    make, queue = SequenceFactory(), make_queue()
    push(queue, make, "much", 50)
    (own,) = push(queue, make, "little")
    first = next(queue.in_order())
    queue.remove(first)
    queue.charge_prompt(first, 500)
    ahead = queue.ahead_of(make(tenant="little"), limit=10)
    assert (ahead.sequences, ahead.num_more) == ([own], 0)


def test_lines_that_were_given_up_leave_nothing_behind():
    """Requests of no urgency that end by their deadlines while somebody of the same waits on."""
    queue, make = make_queue(), SequenceFactory()
    push(queue, make, "patient", priority=9)
    for i in range(2000):
        (sequence,) = push(queue, make, f"tenant{i % 7}", priority=9 + i % 2 * i)
        queue.remove(sequence)
    assert sum(len(heap) for heap in queue._heaps.values()) < 200
    assert len(queue._heaps) < 200
    assert [s.request.tenant for s in queue.in_order()] == ["patient"]


def test_the_spread_is_between_those_who_wait():
    queue, make = make_queue(), SequenceFactory()
    assert (queue.num_active, queue.spread) == (0, 0.0)
    first, second = make(tenant="a"), make(tenant="b")
    queue.push(first)
    queue.push(second)
    assert (queue.num_active, queue.spread) == (2, 0.0)
    queue.remove(first)
    queue.charge_prompt(first, 10)
    assert queue.num_active == 1
    queue.push(make(tenant="a"))
    assert queue.num_active == 2
    assert queue.spread == queue.counter("a") - queue.counter("b") > 0
