from __future__ import annotations

from datetime import UTC, datetime

import pytest

from loraplex.retry import Failure, parse_retry_after_s, parse_should_retry, retry_delay_s

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


def delay_s(failure, *, attempt=0, max_retries=2, is_repeatable=True, jitter=0.0):
    return retry_delay_s(
        failure,
        attempt=attempt,
        max_retries=max_retries,
        is_repeatable=is_repeatable,
        jitter=jitter,
    )


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
def test_a_server_that_says_not_now_is_asked_again(status):
    assert delay_s(Failure(status)) == 0.5


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 409, 413, 422, 504])
def test_an_error_that_would_repeat_is_final(status):
    assert delay_s(Failure(status)) is None


@pytest.mark.parametrize(
    ("failure", "may_retry"),
    [
        (Failure(429), True),
        (Failure(503), True),
        (Failure(500), False),
        (Failure(502), False),
        (Failure(), False),
        (Failure(was_sent=False), True),
        (Failure(was_sent=False, is_timeout=True), True),
        (Failure(is_timeout=True), False),
    ],
)
def test_uploads_and_deletions_are_sent_again_only_when_nothing_was_done(failure, may_retry):
    assert (delay_s(failure, is_repeatable=False) is not None) == may_retry


def test_a_broken_connection_is_retried_but_a_slow_answer_is_not():
    assert delay_s(Failure()) == 0.5
    assert delay_s(Failure(is_timeout=True)) is None


def test_delays_double_up_to_a_limit_and_jitter_shortens_them():
    delays = [delay_s(Failure(500), attempt=n, max_retries=9) for n in range(6)]
    assert delays == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
    assert delay_s(Failure(500), jitter=1.0) == 0.375


def test_attempts_are_limited():
    assert delay_s(Failure(500), attempt=2, max_retries=2) is None
    assert delay_s(Failure(500), max_retries=0) is None


def test_retry_after_is_obeyed_unless_it_is_too_long():
    assert delay_s(Failure(503, retry_after_s=7.0), jitter=0.9) == 7.0
    assert delay_s(Failure(503, retry_after_s=3600.0)) is None


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": "-1"}, 0.0),
        ({"retry-after": "nan"}, 0.0),
        ({"retry-after-ms": "150"}, 0.15),
        ({"retry-after-ms": "x", "retry-after": "2"}, 2.0),
        ({"retry-after": "Thu, 01 Jan 2026 12:00:30 GMT"}, 30.0),
        ({"retry-after": "Thu, 01 Jan 2026 11:00:00 -0000"}, 0.0),
        ({"retry-after": "soon"}, None),
    ],
)
def test_retry_after_is_read_in_every_form(headers, seconds):
    assert parse_retry_after_s(headers, NOW) == seconds


def test_what_the_server_says_of_a_retry_decides():
    assert delay_s(Failure(503, should_retry=False)) is None
    assert delay_s(Failure(504, should_retry=True), is_repeatable=False) == 0.5
    assert delay_s(Failure(504, should_retry=True), max_retries=0) is None


@pytest.mark.parametrize(
    ("value", "meaning"), [("true", True), ("False", False), ("maybe", None), ("", None)]
)
def test_only_true_and_false_say_something_of_a_retry(value, meaning):
    assert parse_should_retry({"x-should-retry": value}) is meaning
    assert parse_should_retry({}) is None
