from __future__ import annotations

import numpy as np
import pytest

from loraplex_server.simulator import workloads
from loraplex_server.simulator.trace import NOBODY
from loraplex_server.simulator.workloads import (
    CHAMELEON_RANKS,
    chameleon_trace,
    multi_turn_trace,
    per_adapter_trace,
    punica_trace,
    slora_trace,
    vtc_trace,
    zipf_shares,
    zipf_trace,
)


def test_slora_draws_from_the_global_stream_in_its_order():
    state = np.random.get_state()
    np.random.seed(42)
    num, alpha, cv = 1200, 0.3, 2.0
    adapter = (200 * np.random.rand(num) ** (1 / alpha)).astype(int)
    inputs = np.random.randint(8, 512, num)
    outputs = np.random.randint(8, 512, num)
    gaps = np.random.gamma(1 / cv**2, cv**2 / 10, num)
    np.random.set_state(state)
    trace = slora_trace(num_adapters=200, rate=10, duration_s=120, alpha=alpha, cv=cv)
    assert trace.adapter.tolist() == adapter.tolist()
    assert trace.prompt_len.tolist() == inputs.tolist()
    assert trace.output_len.tolist() == outputs.tolist()
    assert trace.arrival_s.tolist() == np.cumsum(gaps).tolist()


def test_slora_without_adapters_asks_the_base_model_the_same():
    base = slora_trace(num_adapters=0, rate=10, duration_s=10)
    one = slora_trace(num_adapters=1, rate=10, duration_s=10)
    assert set(base.adapter.tolist()) == {NOBODY}
    assert set(one.adapter.tolist()) == {0}
    assert base.arrival_s.tolist() == one.arrival_s.tolist()
    assert base.output_len.tolist() == one.output_len.tolist()


@pytest.mark.parametrize(("alpha", "share"), [(0.1, 0.468), (0.3, 0.102), (0.6, 0.010)])
def test_slora_skew_gives_the_published_share_to_the_top_adapter(alpha, share):
    trace = slora_trace(num_adapters=2000, rate=100, duration_s=1000, alpha=alpha)
    assert (trace.adapter == 0).mean() == pytest.approx(share, rel=0.1)


def test_slora_lengths_are_half_open_and_gaps_have_the_asked_variation():
    trace = slora_trace(num_adapters=5, rate=100, duration_s=1000, cv=2)
    assert trace.prompt_len.min() == 8
    assert trace.prompt_len.max() == 511
    assert trace.output_len.mean() == pytest.approx(259.5, rel=0.02)
    gaps = np.diff(trace.arrival_s)
    assert gaps.mean() == pytest.approx(0.01, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(2, rel=0.05)


def test_per_adapter_processes_have_their_own_rates_and_bursts():
    trace = per_adapter_trace(num_adapters=20, rate=20, duration_s=2000, zipf_s=1.0, cv=3)
    counts = np.bincount(trace.adapter, minlength=20)
    assert counts[0] / len(trace) == pytest.approx(zipf_shares(20, 1.0)[0], rel=0.2)
    assert len(trace) == pytest.approx(40000, rel=0.1)
    gaps = np.diff(trace.arrival_s[trace.adapter == 0])
    assert gaps.std() / gaps.mean() == pytest.approx(3, rel=0.15)
    assert trace.arrival_s.max() < 2000


def test_zipf_shares_follow_the_exponent():
    trace = zipf_trace(num_adapters=1000, rate=100, duration_s=1000, zipf_s=1.2)
    counts = np.bincount(trace.adapter, minlength=1000)
    assert counts[0] / counts[9] == pytest.approx(10**1.2, rel=0.1)


@pytest.mark.parametrize(
    ("popularity", "distinct"), [("distinct", 1000), ("uniform", 32), ("identical", 1)]
)
def test_punica_popularity_sets_the_number_of_adapters(popularity, distinct):
    trace = punica_trace(popularity=popularity)
    assert len(set(trace.adapter.tolist())) == distinct


def test_punica_skewed_halves_like_a_geometric_series():
    trace = punica_trace(popularity="skewed", num_requests=100_000)
    counts = np.bincount(trace.adapter)
    assert counts[0] / counts[1] == pytest.approx(1.5, rel=0.03)
    assert counts[1] / counts[2] == pytest.approx(1.5, rel=0.03)


def test_chameleon_draws_the_rank_evenly_and_the_adapter_by_power_law():
    trace = chameleon_trace(rate=100, duration_s=1000)
    ranks = np.bincount(trace.adapter % len(CHAMELEON_RANKS))
    assert (ranks / len(trace)).tolist() == pytest.approx([0.2] * 5, rel=0.05)
    inside = np.bincount(trace.adapter // len(CHAMELEON_RANKS))
    assert inside[0] / inside[3] == pytest.approx(4, rel=0.1)
    assert trace.adapter.max() == 99


def test_vtc_clients_keep_their_rates_and_pauses():
    trace = vtc_trace(rates=(1.5, 3.0), duration_s=360, on_off_s=60)
    first = trace.arrival_s[trace.tenant == 0]
    assert ((first // 60) % 2 == 0).all()
    assert (trace.tenant == 1).sum() == 1080
    assert set(trace.prompt_len.tolist()) == {256}


def test_conversations_go_on_until_they_end():
    trace = multi_turn_trace(rate=10, duration_s=1000, num_adapters=50, mean_turns=5)
    is_first = trace.follows == NOBODY
    assert len(trace) / is_first.sum() == pytest.approx(5, rel=0.1)
    later = np.flatnonzero(~is_first)
    assert (trace.follows[later] == later - 1).all()
    assert (trace.adapter[later] == trace.adapter[later - 1]).all()
    assert (trace.arrival_s[later] >= 0).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: zipf_trace(num_adapters=9, rate=5, duration_s=20, seed=seed),
        lambda seed: per_adapter_trace(num_adapters=9, rate=5, duration_s=20, seed=seed),
        lambda seed: chameleon_trace(rate=5, duration_s=20, seed=seed),
        lambda seed: slora_trace(num_adapters=9, rate=5, duration_s=20, seed=seed),
        lambda seed: multi_turn_trace(rate=5, duration_s=20, num_adapters=9, seed=seed),
    ],
)
def test_the_seed_decides_everything(make):
    assert make(1).arrival_s.tolist() == make(1).arrival_s.tolist()
    assert make(1).arrival_s.tolist() != make(2).arrival_s.tolist()


def test_clipped_lengths_stay_in_bounds():
    lengths = workloads.Lengths(median=100, sigma=2.0, least=8, most=300)
    drawn = lengths.draw(np.random.default_rng(0), 10_000)
    assert drawn.min() == 8
    assert drawn.max() == 300
    assert np.median(drawn) == pytest.approx(100, rel=0.1)
