from __future__ import annotations

import pytest

from loraplex_server.api.place_forecast import PlaceForecast


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def forecast_at(clock: Clock, *, stay_s: float, num_places: int = 10) -> PlaceForecast:
    """Return a forecast that saw sequences stay so long."""
    forecast = PlaceForecast(num_places, clock)
    forecast.leave(5, stay_s)
    return forecast


def test_before_anything_ended_it_says_a_second(clock):
    forecast = PlaceForecast(10, clock)
    assert [forecast.retry_after_s(1) for _ in range(3)] == [1.0] * 3


def test_a_crowd_is_told_one_place_after_another(clock):
    forecast = forecast_at(clock, stay_s=2.5)
    told = [forecast.retry_after_s(1) for _ in range(4)]
    assert told == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_whoever_needs_more_places_waits_for_more(clock):
    assert forecast_at(clock, stay_s=2.5).retry_after_s(8) == pytest.approx(2.0)


def test_what_was_told_is_past_when_its_time_is(clock):
    forecast = forecast_at(clock, stay_s=2.5)
    for _ in range(4):
        forecast.retry_after_s(1)
    clock.now += 2
    assert forecast.retry_after_s(1) == pytest.approx(0.25)


def test_a_pause_does_not_make_places_slower(clock):
    forecast = forecast_at(clock, stay_s=2.5)
    clock.now += 8 * 3600
    assert forecast.retry_after_s(1) == pytest.approx(0.25)


def test_clients_that_do_not_wait_make_others_wait_for_one_turn_at_most(clock):
    forecast = forecast_at(clock, stay_s=2.5)
    told = [forecast.retry_after_s(1) for _ in range(1000)]
    assert max(told) == pytest.approx(2.75)


def test_nobody_is_told_longer_than_a_minute_nor_next_to_nothing(clock):
    assert forecast_at(clock, stay_s=10_000.0).retry_after_s(1) == 60.0
    assert forecast_at(clock, stay_s=0.001).retry_after_s(1) == 0.1
