"""Learned step and load times: soon right, not thrown off by a bad step, never negative."""

from __future__ import annotations

import random
import statistics

import pytest

from loraplex_scheduler.step_times import CalibratedStepTimes, StepLoad

PAGE_TOKENS = 16


class Truth:
    """A machine linear in the load, with noise."""

    def __init__(self, scale=1.0, seed=0, noise=0.02):
        self.scale = scale
        self.rng = random.Random(seed)
        self.noise = noise

    def step_s(self, load):
        return self.scale * (
            8e-3
            + 2e-5 * load.num_tokens
            + 1e-5 * load.num_sequences
            + 2e-8 * load.kv_tokens
            + 1e-7 * load.adapter_pages
        )

    def random_load(self):
        num_sequences = self.rng.randint(1, 256)
        num_prompt = self.rng.choice([0, 0, 0, self.rng.randint(1, 1500)])
        return StepLoad(
            num_tokens=num_sequences + num_prompt,
            num_sequences=num_sequences,
            kv_tokens=num_sequences * self.rng.randint(50, 1500) + num_prompt,
            adapter_pages=self.rng.randint(0, num_sequences) * 40,
        )

    def teach(self, times, num_steps):
        for _ in range(num_steps):
            load = self.random_load()
            times.observe_step(load, self.step_s(load) * self.rng.gauss(1, self.noise))

    def median_error(self, times):
        loads = [self.random_load() for _ in range(200)]
        return statistics.median(abs(times.step_s(x) / self.step_s(x) - 1) for x in loads)


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_steps_of_any_machine_are_predicted_after_a_hundred(scale):
    truth, times = Truth(scale), CalibratedStepTimes(PAGE_TOKENS)
    truth.teach(times, 100)
    assert truth.median_error(times) < 0.05


def test_the_first_step_gives_the_order_of_magnitude():
    truth, times = Truth(50.0), CalibratedStepTimes(PAGE_TOKENS)
    load = StepLoad(64, 64, 30_000, 1000)
    times.observe_step(load, truth.step_s(load))
    assert times.step_s(load) == pytest.approx(truth.step_s(load), rel=0.5)


def test_a_first_step_that_compiled_everything_is_got_over():
    truth, times = Truth(), CalibratedStepTimes(PAGE_TOKENS)
    load = truth.random_load()
    times.observe_step(load, 500 * truth.step_s(load))
    truth.teach(times, 200)
    assert truth.median_error(times) < 0.05


def test_before_the_first_step_more_work_takes_longer():
    times = CalibratedStepTimes(PAGE_TOKENS)
    small, large = StepLoad(1, 1, 100, 0), StepLoad(2000, 200, 100_000, 4000)
    assert 0 < times.step_s(small) < times.step_s(large)
    assert times.prefix_page_s() > 0
    assert times.adapter_s(10) > 0


def test_a_step_that_was_held_up_changes_little():
    truth, times = Truth(), CalibratedStepTimes(PAGE_TOKENS)
    truth.teach(times, 300)
    load = truth.random_load()
    before = times.step_s(load)
    times.observe_step(load, 100 * truth.step_s(load))
    assert times.step_s(load) == pytest.approx(before, rel=0.05)


def test_every_twentieth_step_may_be_held_up():
    truth, times = Truth(), CalibratedStepTimes(PAGE_TOKENS)
    for _ in range(100):
        truth.teach(times, 19)
        load = truth.random_load()
        times.observe_step(load, 20 * truth.step_s(load))
    assert truth.median_error(times) < 0.15


@pytest.mark.parametrize("took_s", [1e-3, 1e-5])
def test_a_step_that_seemed_to_take_next_to_no_time_changes_little(took_s):
    """A host that was held up sees two steps end at once, and takes the second one to be short."""
    truth, times = Truth(), CalibratedStepTimes(PAGE_TOKENS)
    truth.teach(times, 300)
    for _ in range(4):
        times.observe_step(truth.random_load(), took_s)
    assert truth.median_error(times) < 0.15
    truth.teach(times, 600)
    assert truth.median_error(times) < 0.05


@pytest.mark.parametrize("scale", [0.1, 0.5, 2.0])
def test_a_machine_that_became_slower_or_faster_is_learned_anew(scale):
    times = CalibratedStepTimes(PAGE_TOKENS)
    Truth().teach(times, 1000)
    changed = Truth(scale, seed=1)
    changed.teach(times, 3000)
    assert changed.median_error(times) < 0.05


def test_what_is_not_seen_for_long_is_not_forgotten():
    truth, times = Truth(), CalibratedStepTimes(PAGE_TOKENS)
    truth.teach(times, 500)
    decode = StepLoad(64, 64, 40_000, 500)
    for _ in range(20_000):
        times.observe_step(decode, truth.step_s(decode) * truth.rng.gauss(1, 0.02))
    prefill = StepLoad(2048, 32, 40_000, 500)
    assert times.step_s(prefill) == pytest.approx(truth.step_s(prefill), rel=0.1)


def test_no_work_is_predicted_to_save_time():
    times, rng = CalibratedStepTimes(PAGE_TOKENS), random.Random(2)
    truth = Truth()
    for _ in range(500):  # times that have nothing to do with the load
        times.observe_step(truth.random_load(), rng.uniform(0.001, 0.1))
    base = StepLoad(100, 50, 50_000, 500)
    more = (
        StepLoad(200, 50, 50_000, 500),
        StepLoad(100, 100, 50_000, 500),
        StepLoad(100, 50, 90_000, 500),
        StepLoad(100, 50, 50_000, 900),
    )
    assert all(times.step_s(load) >= times.step_s(base) for load in more)
    assert times.prefix_page_s() > 0


def test_times_that_cannot_be_are_passed_over():
    times = CalibratedStepTimes(PAGE_TOKENS)
    load = StepLoad(10, 10, 100, 0)
    before = times.step_s(load), times.adapter_s(5)
    times.observe_step(load, 0.0)
    times.observe_step(StepLoad(0, 0, 0, 0), 0.01)
    times.observe_load(5, 0.0)
    assert (times.step_s(load), times.adapter_s(5)) == before


def test_loads_are_learned_with_their_fixed_part():
    times, rng = CalibratedStepTimes(PAGE_TOKENS), random.Random(0)
    for _ in range(200):
        num_pages = rng.randint(10, 2000)
        times.observe_load(num_pages, (0.004 + 5e-5 * num_pages) * rng.gauss(1, 0.05))
    assert times.adapter_s(20) == pytest.approx(0.005, rel=0.2)
    assert times.adapter_s(1500) == pytest.approx(0.079, rel=0.1)


def test_loads_of_one_size_are_learned_too():
    times = CalibratedStepTimes(PAGE_TOKENS)
    for _ in range(50):
        times.observe_load(100, 0.2)
    assert times.adapter_s(100) == pytest.approx(0.2, rel=0.05)


def test_a_page_of_a_prompt_costs_what_its_tokens_add_to_a_step():
    truth, times = Truth(), CalibratedStepTimes(PAGE_TOKENS)
    truth.teach(times, 1000)
    assert times.prefix_page_s() == pytest.approx(PAGE_TOKENS * 2e-5, rel=0.1)
