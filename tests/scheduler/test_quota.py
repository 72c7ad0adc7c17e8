"""Tokens per minute by tenant."""

from __future__ import annotations

import random

import pytest

from loraplex_scheduler.quota import TokenQuota


def test_a_minutes_tokens_may_be_spent_at_once_and_no_more():
    quota = TokenQuota(600)
    assert quota.try_spend("a", 400, 0.0) is None
    assert quota.try_spend("a", 200, 0.0) is None
    assert quota.try_spend("a", 1, 0.0) == pytest.approx(0.1)


def test_who_waits_as_told_is_served_and_who_waits_less_is_not():
    quota = TokenQuota(600)
    quota.try_spend("a", 600, 0.0)
    wait_s = quota.try_spend("a", 50, 1.0)
    assert wait_s == pytest.approx(4.0)
    assert quota.try_spend("a", 50, 1.0 + wait_s - 0.5) == pytest.approx(0.5)
    assert quota.try_spend("a", 50, 1.0 + wait_s + 1e-6) is None


def test_being_refused_costs_nothing():
    quota = TokenQuota(600)
    quota.try_spend("a", 600, 0.0)
    for _ in range(100):
        quota.try_spend("a", 300, 1.0)
    assert quota.try_spend("a", 10, 1.0) is None


def test_tenants_do_not_share():
    quota = TokenQuota(60)
    assert quota.try_spend("a", 60, 0.0) is None
    assert quota.try_spend("b", 60, 0.0) is None


def test_over_time_nobody_gets_more_than_its_rate():
    quota, rng, now, spent = TokenQuota(6000), random.Random(0), 0.0, 0
    while now < 600:
        num_tokens = rng.randint(1, 500)
        if quota.try_spend("a", num_tokens, now) is None:
            spent += num_tokens
        now += rng.expovariate(5)
    assert 6000 * 10 * 0.95 <= spent <= 6000 * 11


def test_a_request_beyond_the_quota_passes_when_the_bucket_is_full_and_leaves_a_debt():
    quota = TokenQuota(600)
    assert quota.try_spend("a", 1, 0.0) is None
    assert quota.try_spend("a", 1800, 0.0) == pytest.approx(0.1)
    assert quota.try_spend("a", 1800, 0.1) is None
    assert quota.try_spend("a", 1, 60.0) == pytest.approx(60.2, abs=0.1)


def test_what_was_not_needed_is_given_back():
    quota = TokenQuota(600)
    quota.try_spend("a", 600, 0.0)
    quota.refund("a", 300)
    assert quota.try_spend("a", 300, 0.0) is None
    assert quota.try_spend("a", 1, 0.0) is not None


def test_giving_back_fills_the_bucket_at_most():
    quota = TokenQuota(600)
    quota.try_spend("a", 10, 0.0)
    quota.refund("a", 5000)
    quota.refund("unknown", 5000)
    for tenant in ("a", "unknown"):
        assert quota.try_spend(tenant, 600, 0.0) is None
        assert quota.try_spend(tenant, 1, 0.0) is not None


def test_a_long_silence_saves_up_no_more_than_a_minutes_tokens():
    quota = TokenQuota(600)
    quota.try_spend("a", 100, 0.0)
    assert quota.try_spend("a", 600, 3600.0) is None
    assert quota.try_spend("a", 1, 3600.0) is not None


def test_who_keeps_asking_is_remembered_before_who_asked_once():
    quota = TokenQuota(600, max_tenants=10)
    for i in range(100):
        quota.try_spend("busy", 6, 0.0)
        quota.try_spend(f"t{i}", 600, 0.0)
    assert quota.try_spend("busy", 1, 0.0) is not None


def test_no_more_tenants_are_remembered_than_allowed_and_recent_debts_stay():
    quota = TokenQuota(60, max_tenants=10)
    for i in range(1000):
        quota.try_spend(f"t{i}", 60, 0.0)
    assert len(quota) == 10
    assert quota.try_spend("t999", 1, 0.0) is not None


def test_a_quota_must_serve_somebody():
    with pytest.raises(ValueError, match="0 tokens"):
        TokenQuota(0)
