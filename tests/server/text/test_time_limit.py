"""Work that does not end is ended; work that does is left alone."""

from __future__ import annotations

import time

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from loraplex_server.text.time_limit import TookTooLong, run_within

ENDLESS = "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}"


def test_an_endless_template_is_ended():
    template = ImmutableSandboxedEnvironment().from_string(ENDLESS)
    began = time.monotonic()
    with pytest.raises(TookTooLong, match=r"longer than 0\.1 s"):
        run_within(0.1, template.render)
    assert time.monotonic() - began < 5


def test_what_ends_in_time_is_left_alone_and_so_is_what_follows():
    limit_s = 0.5  # a thread may have to wait for its turn for a tenth of that
    for _ in range(20):
        assert run_within(limit_s, lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        run_within(limit_s, lambda: 1 // 0)
    deadline = time.monotonic() + limit_s + 0.1
    while time.monotonic() < deadline:
        pass


def test_a_limit_that_is_reached_at_the_very_end_hits_nothing_later():
    for _ in range(100):
        try:
            run_within(0.002, lambda: time.sleep(0.002))
        except TookTooLong:
            continue
