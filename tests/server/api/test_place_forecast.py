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


def forecast_at(clock: Clock, *, rate: float, num_places: int = 10) -> PlaceForecast:
    """Return a forecast that saw sequences end at this rate for a while."""
    forecast = PlaceForecast(num_places, clock)
    for _ in range(50):
        forecast.leave(1)
        clock.now += 1 / rate
    return forecast


def test_before_anything_ended_it_says_a_second(clock):
    assert PlaceForecast(10, clock).retry_after_s(1) == 1.0


def test_a_crowd_is_told_one_place_after_another(clock):
    forecast = forecast_at(clock, rate=4)
    told = [forecast.retry_after_s(1) for _ in range(4)]
    assert told == pytest.approx([0.25, 0.5, 0.75, 1.0], rel=0.05)


def test_whoever_needs_more_places_waits_for_more(clock):
    assert forecast_at(clock, rate=4).retry_after_s(8) == pytest.approx(2.0, rel=0.05)


def test_places_that_came_free_meanwhile_are_not_told_again(clock):
    forecast = forecast_at(clock, rate=4)
    for _ in range(4):
        forecast.retry_after_s(1)
    for _ in range(8):
        forecast.leave(1)
        clock.now += 0.25
    assert forecast.retry_after_s(1) == pytest.approx(0.25, rel=0.05)


def test_clients_that_do_not_wait_make_others_wait_for_one_turn_at_most(clock):
    forecast = forecast_at(clock, rate=4, num_places=10)
    told = [forecast.retry_after_s(1) for _ in range(1000)]
    assert max(told) == pytest.approx(11 / 4, rel=0.05)


def test_nobody_is_told_longer_than_a_minute(clock):
    forecast = forecast_at(clock, rate=0.001, num_places=10)
    assert forecast.retry_after_s(1) == 60.0


def test_a_server_that_stands_still_says_so(clock):
    forecast = forecast_at(clock, rate=100)
    clock.now += 98
    assert forecast.retry_after_s(1) == pytest.approx(2.0, rel=0.1)
